//! Who may call what: credentials, principals and scopes. No HTTP, no clock and no environment: the caller passes the time.

mod scope;

pub use scope::{Scope, UnknownScope};
