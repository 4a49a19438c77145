//! `api.v1.instance.InstanceManager`.

use futures::{StreamExt as _, TryStreamExt as _};
use gauntlet_api::v1::instance::{
    CreateInstanceRequest, DeleteInstanceRequest, Instance, QueryInstanceRequest, RenewInstanceRequest,
    RetrieveInstanceRequest, instance_manager_server::InstanceManager,
};
use gauntlet_domain::{ChallengeId, SourceId};
use tonic::{Request, Response, Status, async_trait};

use super::{Answers, Handlers, answers, convert};
use crate::status::status;

pub(super) fn seat(challenge_id: String, source_id: String) -> Result<(ChallengeId, SourceId), Status> {
    let challenge = convert::challenge_id("challenge_id", challenge_id).map_err(|error| status(&error))?;
    let source = convert::source_id("source_id", source_id).map_err(|error| status(&error))?;
    Ok((challenge, source))
}

#[async_trait]
impl InstanceManager for Handlers {
    async fn create_instance(&self, request: Request<CreateInstanceRequest>) -> Result<Response<Instance>, Status> {
        let request = request.into_inner();
        let (challenge, source) = seat(request.challenge_id, request.source_id)?;
        let additional = convert::additional(request.additional).map_err(|error| status(&error))?;
        let created =
            self.operations.create_instance(challenge, source, additional).await.map_err(|error| status(&error))?;
        Ok(Response::new(convert::instance(created)))
    }

    async fn retrieve_instance(&self, request: Request<RetrieveInstanceRequest>) -> Result<Response<Instance>, Status> {
        let request = request.into_inner();
        let (challenge, source) = seat(request.challenge_id, request.source_id)?;
        let found = self.operations.retrieve_instance(&challenge, &source).await.map_err(|error| status(&error))?;
        Ok(Response::new(convert::instance(found)))
    }

    type QueryInstanceStream = Answers<Instance>;

    async fn query_instance(
        &self,
        request: Request<QueryInstanceRequest>,
    ) -> Result<Response<Self::QueryInstanceStream>, Status> {
        let text = request.into_inner().source_id;
        // No source asks for every source's instances: the answer of the v1 servers to an unset field.
        let source = match text.is_empty() {
            true => None,
            false => Some(convert::source_id("source_id", text).map_err(|error| status(&error))?),
        };
        let found = answers(&self.operations, move |operations| operations.query_instances(source.as_ref()));
        Ok(Response::new(found.map_ok(convert::instance).boxed()))
    }

    async fn renew_instance(&self, request: Request<RenewInstanceRequest>) -> Result<Response<Instance>, Status> {
        let request = request.into_inner();
        let (challenge, source) = seat(request.challenge_id, request.source_id)?;
        let renewed = self.operations.renew_instance(challenge, source).await.map_err(|error| status(&error))?;
        Ok(Response::new(convert::instance(renewed)))
    }

    async fn delete_instance(&self, request: Request<DeleteInstanceRequest>) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let (challenge, source) = seat(request.challenge_id, request.source_id)?;
        self.operations.delete_instance(challenge, source).await.map_err(|error| status(&error))?;
        Ok(Response::new(()))
    }
}
