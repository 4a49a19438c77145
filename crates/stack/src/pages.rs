//! Which web pages the components serve. Some builds have none: that of Jaeger's Go module, and Debian's Alertmanager.

use std::path::Path;

use crate::{Port, Ports, Tool, Tools, http};

const NO_JAEGER_PAGE: &str = "this build has no page, only the API; for the page, download a release and name its binary in GAUNTLET_JAEGER (docs/stack.md)";
const NO_ALERTMANAGER_PAGE: &str = "Debian's package has no page, only the API and amtool; for the page, download a release and name its \
                                    binary in GAUNTLET_ALERTMANAGER (docs/stack.md)";

/// One line each on the pages of Jaeger, Prometheus and Alertmanager. Sends requests to the running components.
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
        return format!("{url}: {NO_JAEGER_PAGE}; {url}/api/services lists the services that send traces");
    }
    format!("{url} shows traces, {url}/monitor rates, errors and latencies")
}

/// Debian ships the older page, which has its own paths.
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

/// Why a binary has no page, and the remedy; `None` if it has one, as far as can be told without running it.
pub fn missing_from(tools: &Tools, tool: Tool, binary: &Path) -> Option<&'static str> {
    match tool {
        Tool::Jaeger if tools.is_own_build(tool, binary) => Some(NO_JAEGER_PAGE),
        Tool::Alertmanager => {
            let is_debian = binary.file_name().is_some_and(|name| name == tool.binary());
            let is_generated = Path::new("/usr/share/prometheus/alertmanager/ui/index.html").exists();
            (is_debian && !is_generated).then_some(NO_ALERTMANAGER_PAGE)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholder_does_not_count_as_a_page() {
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
