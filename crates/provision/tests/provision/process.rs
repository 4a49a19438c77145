//! What the process backend promises beyond the contract.
