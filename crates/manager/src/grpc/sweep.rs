//! `gauntlet.v1.Sweeper`.

use futures::{StreamExt as _, TryStreamExt as _};
use gauntlet_api::extension::{
    DeleteExpiredRequest, DeleteExpiredResponse, ExpiredInstance, ListExpiredRequest, sweeper_server::Sweeper,
};
use gauntlet_domain::Instance;
use tonic::{Request, Response, Status, async_trait};

use super::{Answers, Handlers, answers, convert, instance::seat};
use crate::status::status;

#[async_trait]
impl Sweeper for Handlers {
    type ListExpiredStream = Answers<ExpiredInstance>;

    async fn list_expired(
        &self,
        request: Request<ListExpiredRequest>,
    ) -> Result<Response<Self::ListExpiredStream>, Status> {
        let most = match request.into_inner().limit {
            0 => usize::MAX,
            limit => usize::try_from(limit).unwrap_or(usize::MAX),
        };
        let found = answers(&self.operations, move |operations| operations.expired_instances().take(most).boxed());
        Ok(Response::new(found.map_ok(expired).boxed()))
    }

    async fn delete_expired(
        &self,
        request: Request<DeleteExpiredRequest>,
    ) -> Result<Response<DeleteExpiredResponse>, Status> {
        let request = request.into_inner();
        let (challenge, source) = seat(request.challenge_id, request.source_id)?;
        let since = convert::since(request.since).map_err(|error| status(&error))?;
        let deleted = self.operations.delete_expired_instance(challenge, source, since).await;
        Ok(Response::new(DeleteExpiredResponse { deleted: deleted.map_err(|error| status(&error))? }))
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
