//! Export that starts later than the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether export is held. While it is, nothing is queued, sent or counted as lost.
#[derive(Clone, Debug, Default)]
pub(crate) struct ExportHold(Arc<AtomicBool>);

impl ExportHold {
    pub(crate) fn new(is_held: bool) -> Self {
        Self(Arc::new(AtomicBool::new(is_held)))
    }

    pub(super) fn is_held(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Starts export in a process whose settings hold it. See [`crate::Settings::with_export_held`].
#[derive(Clone, Debug)]
pub struct ExportStart(pub(crate) ExportHold);

impl ExportStart {
    /// Exports what is recorded from now on. Does nothing when export has already started.
    pub fn start(&self) {
        self.0.0.store(false, Ordering::Relaxed);
    }
}
