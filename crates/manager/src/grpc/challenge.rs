//! `api.v1.challenge.ChallengeStore`.

use gauntlet_api::v1::challenge::{
    Challenge, CreateChallengeRequest, DeleteChallengeRequest, RetrieveChallengeRequest, UpdateChallengeRequest,
    challenge_store_server::ChallengeStore,
};
use tonic::{Request, Response, Status, async_trait};

use super::{Handlers, Messages, convert, respond, stream};

#[async_trait]
impl ChallengeStore for Handlers {
    async fn create_challenge(&self, request: Request<CreateChallengeRequest>) -> Result<Response<Challenge>, Status> {
        respond(async {
            let new = convert::new_challenge(request.into_inner())?;
            let challenge = self.operations.create_challenge(new).await?;
            Ok(Response::new(convert::challenge(challenge, Vec::new())))
        })
        .await
    }

    async fn retrieve_challenge(
        &self,
        request: Request<RetrieveChallengeRequest>,
    ) -> Result<Response<Challenge>, Status> {
        respond(async {
            let id = convert::challenge_id("id", request.into_inner().id)?;
            let (challenge, instances) = self.operations.retrieve_challenge(&id).await?;
            Ok(Response::new(convert::challenge(challenge, instances)))
        })
        .await
    }

    type QueryChallengeStream = Messages<Challenge>;

    async fn query_challenge(&self, _: Request<()>) -> Result<Response<Self::QueryChallengeStream>, Status> {
        let message = |(challenge, instances)| convert::challenge(challenge, instances);
        Ok(stream(&self.operations, message, |operations| operations.query_challenges()))
    }

    async fn update_challenge(&self, request: Request<UpdateChallengeRequest>) -> Result<Response<Challenge>, Status> {
        respond(async {
            let (id, update) = convert::challenge_update(request.into_inner())?;
            let updated = self.operations.update_challenge(id, update).await?;
            // Each failure has been logged; the client gets the first.
            match updated.failures.into_iter().next() {
                Some(failure) => Err(failure),
                None => Ok(Response::new(convert::challenge(updated.challenge, updated.instances))),
            }
        })
        .await
    }

    async fn delete_challenge(&self, request: Request<DeleteChallengeRequest>) -> Result<Response<()>, Status> {
        respond(async {
            let id = convert::challenge_id("id", request.into_inner().id)?;
            self.operations.delete_challenge(id).await?;
            Ok(Response::new(()))
        })
        .await
    }
}
