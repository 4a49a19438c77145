//! Real binaries against real components: everything is in `tests/`, one target, so that one stack serves each test in turn.
