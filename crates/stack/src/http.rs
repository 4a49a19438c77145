//! A client for the components' HTTP APIs.

use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use crate::{Error, Result};

fn agent(limit: Duration) -> ureq::Agent {
    ureq::Agent::config_builder().timeout_global(Some(limit)).proxy(None).build().new_agent()
}

/// Whether a GET request returns a 2xx status within two seconds.
pub fn answers(url: &str) -> bool {
    agent(Duration::from_secs(2)).get(url).call().is_ok()
}

/// Gets a JSON document, with a timeout of 10 s.
///
/// # Errors
/// [`Error::Http`] if the request fails or times out, the status isn't 2xx, or the body isn't JSON.
pub fn get_json(url: &str) -> Result<Value> {
    let error = |reason: String| Error::Http { url: url.to_owned(), reason };
    let mut answer = agent(Duration::from_secs(10)).get(url).call().map_err(|e| error(e.to_string()))?;
    let body = answer.body_mut().read_to_string().map_err(|e| error(e.to_string()))?;
    serde_json::from_str(&body).map_err(|e| error(format!("not JSON: {e}")))
}

/// Gets a page, following redirects, with a timeout of 2 s.
///
/// # Errors
/// [`Error::Http`] if the request fails or times out, the status isn't 2xx, or the body isn't text.
pub fn get_text(url: &str) -> Result<String> {
    let error = |e: ureq::Error| Error::Http { url: url.to_owned(), reason: e.to_string() };
    let mut answer = agent(Duration::from_secs(2)).get(url).call().map_err(error)?;
    answer.body_mut().read_to_string().map_err(error)
}

/// Posts a JSON document, with a timeout of 10 s. Ignores the body of the response.
///
/// # Errors
/// [`Error::Http`] if the request fails or times out, or the status isn't 2xx.
pub fn post_json(url: &str, body: &Value) -> Result<()> {
    let request = agent(Duration::from_secs(10)).post(url).content_type("application/json");
    request.send(body.to_string()).map_err(|e| Error::Http { url: url.to_owned(), reason: e.to_string() })?;
    Ok(())
}

/// Percent-encodes a value for a query string.
pub fn encode(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}
