//! `api.v1.challenge.ChallengeStore`.

use futures::{StreamExt as _, TryStreamExt as _};
use gauntlet_api::v1::challenge::{
    Challenge, CreateChallengeRequest, DeleteChallengeRequest, RetrieveChallengeRequest, UpdateChallengeRequest,
    challenge_store_server::ChallengeStore,
};
use tonic::{Request, Response, Status, async_trait};

use super::{Answers, Handlers, answers, convert};
use crate::status::status;

#[async_trait]
impl ChallengeStore for Handlers {
    async fn create_challenge(&self, request: Request<CreateChallengeRequest>) -> Result<Response<Challenge>, Status> {
        let new = convert::new_challenge(request.into_inner()).map_err(|error| status(&error))?;
        let created = self.operations.create_challenge(new).await.map_err(|error| status(&error))?;
        Ok(Response::new(convert::challenge(created, Vec::new())))
    }

    async fn retrieve_challenge(
        &self,
        request: Request<RetrieveChallengeRequest>,
    ) -> Result<Response<Challenge>, Status> {
        let id = convert::challenge_id("id", request.into_inner().id).map_err(|error| status(&error))?;
        let (challenge, instances) = self.operations.retrieve_challenge(&id).await.map_err(|error| status(&error))?;
        Ok(Response::new(convert::challenge(challenge, instances)))
    }

    type QueryChallengeStream = Answers<Challenge>;

    async fn query_challenge(&self, _: Request<()>) -> Result<Response<Self::QueryChallengeStream>, Status> {
        let found = answers(&self.operations, |operations| operations.query_challenges());
        Ok(Response::new(found.map_ok(|(challenge, instances)| convert::challenge(challenge, instances)).boxed()))
    }

    async fn update_challenge(&self, request: Request<UpdateChallengeRequest>) -> Result<Response<Challenge>, Status> {
        let (id, update) = convert::challenge_update(request.into_inner()).map_err(|error| status(&error))?;
        let updated = self.operations.update_challenge(id, update).await.map_err(|error| status(&error))?;
        // Each is logged and counted by now; one is the answer.
        match updated.failures.first() {
            Some(failure) => Err(status(failure)),
            None => Ok(Response::new(convert::challenge(updated.challenge, updated.instances))),
        }
    }

    async fn delete_challenge(&self, request: Request<DeleteChallengeRequest>) -> Result<Response<()>, Status> {
        let id = convert::challenge_id("id", request.into_inner().id).map_err(|error| status(&error))?;
        self.operations.delete_challenge(id).await.map_err(|error| status(&error))?;
        Ok(Response::new(()))
    }
}
