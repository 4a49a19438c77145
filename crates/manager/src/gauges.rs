//! The gauges `challenges`, `instances` and overdue instances: counted in the store whenever metrics are collected.

use std::sync::Arc;

use gauntlet_domain::Store;
use gauntlet_telemetry::{Gauges, Sample, names};
use jiff::Timestamp;

/// Registers the gauges. `store` is not the observed one: a collection must not show up as a call.
pub(crate) fn register(gauges: &Gauges, store: Arc<dyn Store>) {
    let read = move || {
        let store = store.clone();
        async move {
            let census = store.census(Timestamp::now()).await?;
            let instances = census.instances.into_iter().map(|((challenge, phase, pool), count)| {
                Sample::new(&names::INSTANCES, count)
                    .with_attribute("challenge", challenge.as_str())
                    .with_attribute("state", phase.name())
                    .with_attribute("pool", if pool { "true" } else { "false" })
            });
            let totals = [
                Sample::new(&names::CHALLENGES, census.challenges),
                Sample::new(&names::INSTANCES_OVERDUE, census.overdue),
            ];
            Ok(totals.into_iter().chain(instances).collect())
        }
    };
    gauges.register(&[&names::CHALLENGES, &names::INSTANCES, &names::INSTANCES_OVERDUE], read);
}
