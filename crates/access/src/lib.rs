//! Who may call what: credentials, principals and scopes. No HTTP, no clock, no environment and no files: the caller passes time, randomness and
//! text.
//!
//! A [`Principal`] comes from a bearer token ([`TokenFile`]), a client certificate ([`SubjectFile`]) or a JWT ([`JwtVerifier`]). The two files have one JSON object per line;
//! empty lines and lines that start with `#` are ignored. A file with an error is refused as a whole, with the line, the field and the fix.

mod jwt;
mod principal;
mod rate;
mod records;
mod scope;
mod subjects;
mod token;
mod tokens;

pub use jwt::{InvalidKeys, JwtPolicy, JwtRejection, JwtVerifier, Keys};
pub use principal::{Challenges, Kind, Name, Principal};
pub use rate::{Exceeded, RateLimit};
pub use records::FileError;
pub use scope::{Scope, UnknownScope};
pub use subjects::SubjectFile;
pub use token::{InvalidToken, Token, TokenId};
pub use tokens::{Rejection, TokenFile, TokenRecord, append_record, remove_record};
