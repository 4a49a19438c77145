//! Scenario references, OCI pull and push, templates, flag variation.
