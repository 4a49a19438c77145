//! One operation on one repository: authenticates when the registry asks for it.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header::WWW_AUTHENTICATE};
use http_auth::ChallengeRef;
use reqwest::{Response, Url};
use secrecy::{ExposeSecret as _, SecretString, zeroize::Zeroizing};
use serde::Deserialize;

use super::{
    Reference,
    allowed::Host,
    failure::Failure,
    login::{Login, Logins},
    transport::{Request, Transport, body, successful},
};

/// The largest response of a token service, in bytes.
const MAX_TOKEN_BYTES: usize = 256 << 10;

/// What an operation does with a repository.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Action {
    /// Reads from it.
    Pull,
    /// Writes to it.
    Push,
}

/// What a session needs.
pub(crate) struct Gate {
    pub(crate) transport: Transport,
    pub(crate) logins: Logins,
    pub(crate) token_hosts: Vec<Host>,
}

/// Requests to one repository. Keeps what authenticates them.
pub(crate) struct Session<'a> {
    gate: &'a Gate,
    base: Url,
    /// Credentials are looked up by the name in references.
    registry: Host,
    scope: String,
    authorization: Option<HeaderValue>,
}

#[derive(Deserialize)]
struct Token {
    token: Option<SecretString>,
    access_token: Option<SecretString>,
}

impl<'a> Session<'a> {
    pub(crate) fn new(gate: &'a Gate, target: &Reference, action: Action) -> Result<Self, Failure> {
        let base = gate.transport.base(target.resolve_registry())?;
        let registry = super::host(target)?;
        let actions = match action {
            Action::Pull => "pull",
            Action::Push => "pull,push",
        };
        let scope = format!("repository:{}:{actions}", target.repository());
        Ok(Self { gate, base, registry, scope, authorization: None })
    }

    /// The URL of a path of the registry's API, below the repository.
    pub(crate) fn url(&self, target: &Reference, path: &str) -> Result<Url, Failure> {
        let path = format!("v2/{}/{path}", target.repository());
        self.base.join(&path).map_err(|error| Failure::broken(format!("{path:?} is no path: {error}")))
    }

    /// The URL that the registry gave for an upload. It must be the registry's own, because content and credentials are sent there.
    pub(crate) fn own_url(&self, location: &str) -> Result<Url, Failure> {
        let url = self.base.join(location).ok().filter(|url| url.origin() == self.base.origin());
        url.ok_or_else(|| Failure::broken("wants uploads at another host; push to that host"))
    }

    /// Sends a request. Authenticates and sends it again if the registry demands it. The response may be a failure.
    pub(crate) async fn send(&mut self, request: Request) -> Result<Response, Failure> {
        let transport = &self.gate.transport;
        let response = transport.send(&self.base, request.clone(), self.authorization.as_ref()).await?;
        // Only the registry itself can ask for its credentials, not a server that it redirects to.
        if response.status() != StatusCode::UNAUTHORIZED || response.url().origin() != self.base.origin() {
            return Ok(response);
        }
        let authorization = self.authenticate(response.headers()).await?;
        let authorization = self.authorization.insert(authorization);
        transport.send(&self.base, request, Some(authorization)).await
    }

    async fn authenticate(&self, headers: &HeaderMap) -> Result<HeaderValue, Failure> {
        let offered: Vec<&str> =
            headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()).collect();
        let challenges: Vec<ChallengeRef<'_>> =
            offered.iter().filter_map(|text| http_auth::parse_challenges(text).ok()).flatten().collect();
        let of_scheme =
            |scheme: &str| challenges.iter().find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme));
        let login = self.gate.logins.of(&self.registry).await?;
        if let Some(challenge) = of_scheme("Bearer") {
            let token = self.token(challenge, login.as_ref()).await?;
            return sensitive(Zeroizing::new(format!("Bearer {}", token.expose_secret())));
        }
        match (of_scheme("Basic"), login) {
            (Some(_), Some(Login::Password(username, password))) => basic(&username, &password),
            _ => Err(Failure::Denied),
        }
    }

    /// Gets a token from the token service that the registry names.
    async fn token(&self, challenge: &ChallengeRef<'_>, login: Option<&Login>) -> Result<SecretString, Failure> {
        let parameter = |name: &str| {
            let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped())
        };
        let realm = parameter("realm").and_then(|realm| Url::parse(&realm).ok());
        let mut realm = realm.ok_or_else(|| Failure::broken("asks for a token without naming a valid realm"))?;
        let Gate { transport, token_hosts, .. } = self.gate;
        if login.is_some() && !transport.may_authenticate_at(&self.base, &realm, token_hosts) {
            let host = Host::of(&realm).map(|host| host.to_string()).unwrap_or_default();
            return Err(Failure::broken(format!(
                "wants its credentials to be sent to {}://{host}, which is not its own host; if that is right, pass --oci-token-host {host}",
                realm.scheme()
            )));
        }
        let mut parameters = vec![("scope", self.scope.clone())];
        parameters.extend(parameter("service").map(|service| ("service", service)));
        let (request, authorization) = match login {
            Some(Login::Identity(token)) => {
                parameters.extend([
                    ("grant_type", "refresh_token".to_owned()),
                    ("client_id", "gauntlet".to_owned()),
                    ("refresh_token", token.expose_secret().to_owned()),
                ]);
                let form =
                    Url::parse_with_params("form:", parameters).map_err(|error| Failure::broken(error.to_string()))?;
                let content = form.query().unwrap_or_default().to_owned().into();
                let request = Request {
                    content: Some(("application/x-www-form-urlencoded", content)),
                    ..Request::new(Method::POST, realm)
                };
                (request, None)
            }
            login => {
                realm.query_pairs_mut().extend_pairs(parameters);
                let authorization = match login {
                    Some(Login::Password(username, password)) => Some(basic(username, password)?),
                    _ => None,
                };
                (Request::new(Method::GET, realm), authorization)
            }
        };
        let response = match transport.send(&self.base, request, authorization.as_ref()).await {
            Ok(response) => successful(response).await,
            Err(failure) => Err(failure),
        };
        let response = response.map_err(|failure| match failure {
            Failure::Denied => Failure::Denied,
            failure => Failure::broken(format!("token service: {failure}")),
        })?;
        let bytes = Zeroizing::new(body(response, MAX_TOKEN_BYTES).await?);
        let token = serde_json::from_slice::<Token>(&bytes).ok().and_then(|token| token.token.or(token.access_token));
        token.ok_or_else(|| Failure::broken("token service: the response holds no token"))
    }
}

fn basic(username: &str, password: &SecretString) -> Result<HeaderValue, Failure> {
    let pair = Zeroizing::new(format!("{username}:{}", password.expose_secret()));
    sensitive(Zeroizing::new(format!("Basic {}", BASE64_STANDARD.encode(pair.as_bytes()))))
}

/// A header value that `Debug` hides.
fn sensitive(text: Zeroizing<String>) -> Result<HeaderValue, Failure> {
    let mut value =
        HeaderValue::from_str(&text).map_err(|_| Failure::broken("the token holds characters that no header may"))?;
    value.set_sensitive(true);
    Ok(value)
}
