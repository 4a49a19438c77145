//! The manager: gRPC, REST and background work over the ports.
