//! The sampler that the configuration selects.

use opentelemetry_sdk::trace::{Sampler as SdkSampler, SamplingDecision, SamplingResult, ShouldSample};

use crate::config::{Config, Sampler};

/// The configured sampler. With `record_all` it also records, for the debug page, the spans that it does not sample.
pub(crate) fn sampler(config: &Config, record_all: bool) -> Box<dyn ShouldSample> {
    let root = match config.sampler {
        Sampler::AlwaysOn => SdkSampler::AlwaysOn,
        Sampler::AlwaysOff => SdkSampler::AlwaysOff,
        Sampler::Ratio(ratio) => SdkSampler::TraceIdRatioBased(ratio),
    };
    let sampler = if config.parent_based { SdkSampler::ParentBased(Box::new(root)) } else { root };
    if record_all { Box::new(RecordAll(sampler)) } else { Box::new(sampler) }
}

/// Records the spans that the inner sampler drops. They stay unsampled, so they are never exported.
#[derive(Clone, Debug)]
struct RecordAll(SdkSampler);

impl ShouldSample for RecordAll {
    fn should_sample(
        &self,
        parent: Option<&opentelemetry::Context>,
        trace: opentelemetry::trace::TraceId,
        name: &str,
        kind: &opentelemetry::trace::SpanKind,
        attributes: &[opentelemetry::KeyValue],
        links: &[opentelemetry::trace::Link],
    ) -> SamplingResult {
        let mut result = self.0.should_sample(parent, trace, name, kind, attributes, links);
        if result.decision == SamplingDecision::Drop {
            result.decision = SamplingDecision::RecordOnly;
        }
        result
    }
}
