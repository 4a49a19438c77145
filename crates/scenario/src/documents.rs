//! Caches parsed documents by digest, so that creating an instance parses nothing.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{digest::Digest, document::Document};

/// The number of documents that are cached.
const CAPACITY: usize = 64;

/// Documents, the most recently used first.
#[derive(Debug, Default)]
pub(crate) struct Documents(Mutex<VecDeque<(Digest, Arc<Document>)>>);

impl Documents {
    pub(crate) fn get(&self, digest: Digest) -> Option<Arc<Document>> {
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = cached.iter().position(|(of, _)| *of == digest)?;
        let entry = cached.remove(at)?;
        let document = entry.1.clone();
        cached.push_front(entry);
        Some(document)
    }

    pub(crate) fn insert(&self, digest: Digest, document: Arc<Document>) {
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cached.retain(|(of, _)| *of != digest);
        cached.truncate(CAPACITY - 1);
        cached.push_front((digest, document));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn least_recently_used_document_is_dropped_first() {
        let text = "version: 1\nprovisioner: process\nprocess: { command: [a] }\nready: { output: { contains: up } }\nconnection_info: x\n";
        let document = Arc::new(Document::parse(text).unwrap());
        let documents = Documents::default();
        let digest = |number: usize| Digest::of(&number.to_be_bytes());
        for number in 0..CAPACITY {
            documents.insert(digest(number), document.clone());
        }
        assert!(documents.get(digest(0)).is_some());
        documents.insert(digest(CAPACITY), document.clone());
        documents.insert(digest(CAPACITY), document);
        assert!([0, 2, CAPACITY].iter().all(|number| documents.get(digest(*number)).is_some()));
        assert!(documents.get(digest(1)).is_none());
    }
}
