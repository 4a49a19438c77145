//! `gauntlet.v1.Sweeper`.

use futures::StreamExt as _;
use gauntlet_api::extension::{
    DeleteExpiredRequest, DeleteExpiredResponse, ExpiredInstance, ListExpiredRequest, sweeper_server::Sweeper,
};
use gauntlet_domain::Instance;
use tonic::{Request, Response, Status, async_trait};

use super::{Handlers, Messages, convert, respond, stream};
use crate::{audit::Change, caller::Caller};

#[async_trait]
impl Sweeper for Handlers {
    type ListExpiredStream = Messages<ExpiredInstance>;

    async fn list_expired(
        &self,
        request: Request<ListExpiredRequest>,
    ) -> Result<Response<Self::ListExpiredStream>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let limit = match request.into_inner().limit {
                0 => usize::MAX,
                limit => usize::try_from(limit).unwrap_or(usize::MAX),
            };
            Ok(stream(&self.operations, expired, move |operations| {
                operations.expired_instances(&caller).take(limit).boxed()
            }))
        })
        .await
    }

    async fn delete_expired(
        &self,
        request: Request<DeleteExpiredRequest>,
    ) -> Result<Response<DeleteExpiredResponse>, Status> {
        respond(async {
            let caller = Caller::of(&request)?;
            let request = request.into_inner();
            let (challenge, source) = convert::instance_ids(request.challenge_id, request.source_id)?;
            let since = convert::since(request.since)?;
            let record = Change::of_instance("DeleteExpired", &challenge, &source).begin(&caller)?;
            let deleted = self.operations.delete_expired_instance(record, challenge, source, since).await?;
            Ok(Response::new(DeleteExpiredResponse { deleted }))
        })
        .await
    }
}

fn expired(instance: Instance) -> ExpiredInstance {
    ExpiredInstance {
        challenge_id: instance.key.challenge.as_str().to_owned(),
        source_id: instance.key.assignment.source().map(|source| source.as_str().to_owned()).unwrap_or_default(),
        until: instance.until.map(convert::timestamp),
        since: Some(convert::timestamp(instance.since)),
    }
}

#[cfg(test)]
mod tests;
