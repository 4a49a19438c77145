//! The web pages of the components. A binary may come without its page: Jaeger's module and Debian's Alertmanager have none.

use std::path::Path;

use crate::{Port, Ports, Tool, Tools, http};

const NO_JAEGER_PAGE: &str =
    "no page in this build, only the API: a release has it, name its binary in GAUNTLET_JAEGER (docs/stack.md)";
const NO_ALERTMANAGER_PAGE: &str = "no page in Debian's package, only the API and amtool: a release has it, name its binary in \
                                    GAUNTLET_ALERTMANAGER (docs/stack.md)";

/// What a browser finds at the addresses of Jaeger, Prometheus and Alertmanager, a line each. Asks the running components.
pub fn lines(ports: &Ports) -> [(&'static str, String); 3] {
    let url = |port| ports.url(port);
    let body = |port| http::get_text(&url(port)).unwrap_or_default();
    let jaeger = jaeger_line(&url(Port::JaegerQuery), &body(Port::JaegerQuery));
    let rules = format!("{}/alerts", url(Port::Prometheus));
    let prometheus = prometheus_line(&url(Port::Prometheus), http::answers(&rules));
    let alertmanager = alertmanager_line(&url(Port::Alertmanager), &body(Port::Alertmanager));
    [("Jaeger", jaeger), ("Prometheus", prometheus), ("Alertmanager", alertmanager)]
}

fn jaeger_line(url: &str, body: &str) -> String {
    if body.contains("not compiled with the UI assets") {
        return format!("{url}: {NO_JAEGER_PAGE}; {url}/api/services lists who sends traces");
    }
    format!("{url} shows traces, {url}/monitor rates, errors and latencies")
}

/// Debian ships the older page, at addresses of its own.
fn prometheus_line(url: &str, is_new: bool) -> String {
    let base = if is_new { url.to_owned() } else { format!("{url}/classic") };
    format!("{base}/alerts shows the rules, {base}/graph takes queries")
}

fn alertmanager_line(url: &str, body: &str) -> String {
    if body.contains("does not include a web") {
        return format!("{url}: {NO_ALERTMANAGER_PAGE}; amtool --alertmanager.url={url} alert");
    }
    format!("{url} shows alerts and silences")
}

/// Why a binary has no page and what has one; `None` when it has one, as far as the binary tells.
pub fn missing_from(tools: &Tools, tool: Tool, binary: &Path) -> Option<&'static str> {
    match tool {
        Tool::Jaeger if tools.is_our_build(tool, binary) => Some(NO_JAEGER_PAGE),
        Tool::Alertmanager => {
            let is_debian = binary.file_name().is_some_and(|name| name == tool.binary());
            let is_made = Path::new("/usr/share/prometheus/alertmanager/ui/index.html").exists();
            (is_debian && !is_made).then_some(NO_ALERTMANAGER_PAGE)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placeholder_is_not_taken_for_a_page() {
        let url = "http://127.0.0.1:16686";
        let placeholder = "you are running a binary that was not compiled with the UI assets.";
        assert!(jaeger_line(url, placeholder).contains("GAUNTLET_JAEGER"));
        assert!(jaeger_line(url, "<div id=\"jaeger-ui-root\">").contains("shows traces"));
        assert!(
            alertmanager_line(url, "The Debian package of the alertmanager does not include a web\napplication")
                .contains("amtool")
        );
        assert!(alertmanager_line(url, "<title>Alertmanager</title>").contains("shows alerts"));
        assert!(prometheus_line(url, false).starts_with("http://127.0.0.1:16686/classic/alerts"));
    }
}
