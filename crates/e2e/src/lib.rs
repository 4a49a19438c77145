//! Real binaries against real components.
