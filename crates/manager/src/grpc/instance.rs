//! `api.v1.instance.InstanceManager`.

use gauntlet_api::v1::instance::{
    CreateInstanceRequest, DeleteInstanceRequest, Instance, QueryInstanceRequest, RenewInstanceRequest,
    RetrieveInstanceRequest, instance_manager_server::InstanceManager,
};
use tonic::{Request, Response, Status, async_trait};

use super::{Handlers, Messages, convert, respond, stream};
use crate::{audit::Change, caller::Caller};

#[async_trait]
impl InstanceManager for Handlers {
    async fn create_instance(&self, request: Request<CreateInstanceRequest>) -> Result<Response<Instance>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let request = request.into_inner();
            let (challenge, source) = convert::instance_ids(request.challenge_id, request.source_id)?;
            let additional = convert::additional(request.additional)?;
            let record = Change::of_instance("CreateInstance", &challenge, &source).begin(&caller)?;
            let instance = self.operations.create_instance(record, challenge, source, additional).await?;
            Ok(Response::new(convert::instance(instance)))
        })
        .await
    }

    async fn retrieve_instance(&self, request: Request<RetrieveInstanceRequest>) -> Result<Response<Instance>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let request = request.into_inner();
            let (challenge, source) = convert::instance_ids(request.challenge_id, request.source_id)?;
            caller.check(&challenge)?;
            let instance = self.operations.retrieve_instance(&challenge, &source).await?;
            Ok(Response::new(convert::instance(instance)))
        })
        .await
    }

    type QueryInstanceStream = Messages<Instance>;

    async fn query_instance(
        &self,
        request: Request<QueryInstanceRequest>,
    ) -> Result<Response<Self::QueryInstanceStream>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let text = request.into_inner().source_id;
            // An unset source asks for the instances of all sources, as in the v1 servers.
            let source = if text.is_empty() { None } else { Some(convert::source_id("source_id", text)?) };
            Ok(stream(&self.operations, convert::instance, move |operations| {
                operations.query_instances(&caller, source.as_ref())
            }))
        })
        .await
    }

    async fn renew_instance(&self, request: Request<RenewInstanceRequest>) -> Result<Response<Instance>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let request = request.into_inner();
            let (challenge, source) = convert::instance_ids(request.challenge_id, request.source_id)?;
            let record = Change::of_instance("RenewInstance", &challenge, &source).begin(&caller)?;
            let instance = self.operations.renew_instance(record, challenge, source).await?;
            Ok(Response::new(convert::instance(instance)))
        })
        .await
    }

    async fn delete_instance(&self, request: Request<DeleteInstanceRequest>) -> Result<Response<()>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let request = request.into_inner();
            let (challenge, source) = convert::instance_ids(request.challenge_id, request.source_id)?;
            let record = Change::of_instance("DeleteInstance", &challenge, &source).begin(&caller)?;
            self.operations.delete_instance(record, challenge, source).await?;
            Ok(Response::new(()))
        })
        .await
    }
}
