//! `api.v1.challenge.ChallengeStore`.

use gauntlet_api::v1::challenge::{
    Challenge, CreateChallengeRequest, DeleteChallengeRequest, RetrieveChallengeRequest, UpdateChallengeRequest,
    challenge_store_server::ChallengeStore,
};
use tonic::{Request, Response, Status, async_trait};

use super::{Handlers, Messages, convert, respond, stream};
use crate::{audit::Change, caller::Caller};

#[async_trait]
impl ChallengeStore for Handlers {
    async fn create_challenge(&self, request: Request<CreateChallengeRequest>) -> Result<Response<Challenge>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let new = convert::new_challenge(request.into_inner())?;
            let record = Change::of_challenge("CreateChallenge", &new.id).begin(&caller)?;
            let challenge = self.operations.create_challenge(record, new).await?;
            Ok(Response::new(convert::challenge(challenge, Vec::new())))
        })
        .await
    }

    async fn retrieve_challenge(
        &self,
        request: Request<RetrieveChallengeRequest>,
    ) -> Result<Response<Challenge>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let id = convert::challenge_id("id", request.into_inner().id)?;
            caller.check(&id)?;
            let (challenge, instances) = self.operations.retrieve_challenge(&id).await?;
            Ok(Response::new(convert::challenge(challenge, instances)))
        })
        .await
    }

    type QueryChallengeStream = Messages<Challenge>;

    async fn query_challenge(&self, request: Request<()>) -> Result<Response<Self::QueryChallengeStream>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let message = |(challenge, instances)| convert::challenge(challenge, instances);
            Ok(stream(&self.operations, message, move |operations| operations.query_challenges(&caller)))
        })
        .await
    }

    async fn update_challenge(&self, request: Request<UpdateChallengeRequest>) -> Result<Response<Challenge>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let (id, update) = convert::challenge_update(request.into_inner())?;
            let record = Change::of_challenge("UpdateChallenge", &id).begin(&caller)?;
            let updated = self.operations.update_challenge(record, id, update).await?;
            // Each failure has been logged; the client gets the first.
            match updated.failures.into_iter().next() {
                Some(failure) => Err(failure.into()),
                None => Ok(Response::new(convert::challenge(updated.challenge, updated.instances))),
            }
        })
        .await
    }

    async fn delete_challenge(&self, request: Request<DeleteChallengeRequest>) -> Result<Response<()>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let id = convert::challenge_id("id", request.into_inner().id)?;
            let record = Change::of_challenge("DeleteChallenge", &id).begin(&caller)?;
            self.operations.delete_challenge(record, id).await?;
            Ok(Response::new(()))
        })
        .await
    }
}
