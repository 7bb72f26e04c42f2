//! Requests to the Hub and what their answers mean.
//!
//! hf-hub has a client as well, which is not used: it sends the token to the server that large files are redirected to,
//! and it appends to a partial file whatever the server sends, without a look at lengths and checksums.

use std::time::Duration;

use hf_hub::Repo;
use hf_hub::api::RepoInfo;
use ureq::http::{Response, Uri, header};
use ureq::{Agent, Body};

use super::is_name;
use super::problem::HubProblem;
use super::settings::{Settings, without_user};

/// How long a server may be silent.
const PATIENCE: Duration = Duration::from_secs(30);
const MOST_REDIRECTS: usize = 10;
/// Most bytes of a list of files.
const LARGEST_LIST: u64 = 64 << 20;
/// Most bytes of a file: no file system has longer ones.
const LARGEST_FILE: u64 = i64::MAX as u64;

/// What is known of a file before it is fetched.
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    /// Its name among the blobs.
    pub(super) etag: String,
    /// Its length in bytes.
    pub(super) size: u64,
}

impl Metadata {
    /// Its SHA-256, if the Hub says it: that is the etag of large files. Others have one of Git, of SHA-1.
    pub(super) fn checksum(&self) -> Option<&str> {
        let is_checksum = self.etag.len() == 64 && self.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_checksum.then_some(&self.etag)
    }
}

/// A connection to the Hub.
pub(super) struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
}

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Request {
    /// The length and etag of a file.
    Head,
    /// The content from this byte on.
    Get { start: u64 },
}

/// The server that a URL names, with its port if that is told; a password in the URL is left out.
fn host(url: &str) -> String {
    let uri: Option<Uri> = url.parse().ok();
    let authority = uri.as_ref().and_then(Uri::authority);
    let told = authority.map(|authority| match authority.port() {
        Some(port) => format!("{}:{port}", authority.host()),
        None => authority.host().to_string(),
    });
    told.unwrap_or_else(|| without_user(url))
}

impl<'a> Client<'a> {
    pub(super) fn new(settings: &'a Settings) -> Self {
        let config = Agent::config_builder()
            // Redirects are followed here, so that no other server gets the token.
            .max_redirects(0)
            .http_status_as_error(false)
            .user_agent(concat!("burn-peft/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .build();
        Self { agent: config.into(), settings }
    }

    /// The commit of a revision, and the names of its files.
    pub(super) fn info(&self, repo: &Repo) -> Result<RepoInfo, HubProblem> {
        let url = format!("{}/api/{}", self.settings.endpoint, repo.api_url());
        let mut response = self.send(&url, Request::Get { start: 0 }, false)?;
        let unreadable = |what: String| HubProblem::Answer { host: host(&url), what };
        let body = response.body_mut().with_config().limit(LARGEST_LIST).read_to_vec();
        let body = body.map_err(|source| unreachable(&url, source))?;
        let info: RepoInfo = serde_json::from_slice(&body)
            .map_err(|error| unreadable(format!("is no list of files: {error}")))?;
        // It becomes a folder name of the cache.
        if !is_name(&info.sha) {
            return Err(unreadable("has no commit".to_string()));
        }
        Ok(info)
    }

    /// The etag and length of a file.
    pub(super) fn metadata(&self, repo: &Repo, file: &str) -> Result<Metadata, HubProblem> {
        let url = self.url(repo, file);
        let response = self.send(&url, Request::Head, true)?;
        let etag = text(&response, "x-linked-etag").or_else(|| text(&response, "etag"));
        let size = text(&response, "x-linked-size").or_else(|| text(&response, "content-length"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_string());
        let lacks =
            |what: &str| HubProblem::Answer { host: host(&url), what: format!("has no {what} of `{file}`") };
        let size = size.and_then(|size| size.parse::<u64>().ok()).filter(|size| *size <= LARGEST_FILE);
        Ok(Metadata {
            // It becomes a file name of the cache.
            etag: etag.filter(|etag| is_name(etag)).ok_or_else(|| lacks("etag"))?,
            size: size.ok_or_else(|| lacks("possible length"))?,
        })
    }

    /// The content of a file from byte `start` on; the status tells if the server sends that part.
    pub(super) fn get(&self, repo: &Repo, file: &str, start: u64) -> Result<Response<Body>, HubProblem> {
        self.send(&self.url(repo, file), Request::Get { start }, true)
    }

    fn url(&self, repo: &Repo, file: &str) -> String {
        format!("{}/{}/resolve/{}/{file}", self.settings.endpoint, repo.url(), repo.url_revision())
    }

    /// Asks, and follows redirects: for the length and etag of a file only until they are told.
    fn send(&self, url: &str, request: Request, is_file: bool) -> Result<Response<Body>, HubProblem> {
        let mut url = url.to_string();
        for _ in 0..MOST_REDIRECTS {
            let is_hub = origin(&url).is_some_and(|found| Some(found) == origin(&self.settings.endpoint));
            let mut builder = match request {
                Request::Head => self.agent.head(&url),
                Request::Get { .. } => self.agent.get(&url),
            };
            // A compressed answer has another length.
            builder = builder.header(header::ACCEPT_ENCODING, "identity");
            if let Some(token) = self.settings.token.as_ref().filter(|_| is_hub) {
                builder = builder.header(header::AUTHORIZATION, format!("Bearer {}", token.secret));
            }
            if let Request::Get { start: start @ 1.. } = request {
                builder = builder.header(header::RANGE, format!("bytes={start}-"));
            }
            let mut response = builder.call().map_err(|source| unreachable(&url, source))?;
            let status = response.status();
            let is_told = request == Request::Head
                && ["x-linked-etag", "x-linked-size"]
                    .iter()
                    .all(|name| response.headers().contains_key(*name));
            let is_beyond_the_end = matches!(request, Request::Get { start: 1.. }) && status == 416;
            if status.is_success() || is_beyond_the_end || status.is_redirection() && is_told {
                return Ok(response);
            }
            if !status.is_redirection() {
                return Err(refusal(&mut response, &url, is_hub, is_file));
            }
            let target = text(&response, "location").and_then(|location| joined(&url, location));
            let no_target = "redirects to no address".to_string();
            url = target.ok_or_else(|| HubProblem::Answer { host: host(&url), what: no_target })?;
        }
        Err(HubProblem::Answer { host: host(&url), what: "redirects in a circle".to_string() })
    }
}

fn text<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

fn unreachable(url: &str, source: ureq::Error) -> HubProblem {
    let source = match source {
        // It tells the URL.
        ureq::Error::BadUri(what) => format!("bad address: {}", without_user(&what)).into(),
        other => other.into(),
    };
    HubProblem::Unreachable { host: host(url), source }
}

/// Scheme, host and port of a URL, with the user and password if it has them.
fn origin(url: &str) -> Option<(String, String)> {
    let uri: Uri = url.parse().ok()?;
    let authority = uri.authority()?.as_str();
    // Capital letters differ in a password, and not in a host.
    let (user, host) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
    Some((uri.scheme_str()?.to_lowercase(), format!("{user}{}", host.to_lowercase())))
}

/// What the `location` of an answer from `url` means.
fn joined(url: &str, location: &str) -> Option<String> {
    let (scheme, authority) = origin(url)?;
    if location.starts_with("//") {
        Some(format!("{scheme}:{location}"))
    } else if location.starts_with('/') {
        Some(format!("{scheme}://{authority}{location}"))
    } else {
        origin(location).map(|_| location.to_string())
    }
}

/// What an answer that is no success means. The Hub says it in a header; other servers have a status only.
fn refusal(response: &mut Response<Body>, url: &str, is_hub: bool, is_file: bool) -> HubProblem {
    let status = response.status().as_u16();
    let code = text(response, "x-error-code").unwrap_or_default();
    let message = text(response, "x-error-message").unwrap_or_default();
    match (status, code) {
        _ if !is_hub => {}
        (401, _) if message.starts_with("Invalid credentials") => return HubProblem::InvalidToken,
        (_, "GatedRepo") => return HubProblem::Gated { status },
        (_, "RepoNotFound") => return HubProblem::NoRepository { status },
        (_, "RevisionNotFound") => return HubProblem::NoRevision,
        (_, "EntryNotFound") => return HubProblem::NoFile { status },
        (403, _) => return HubProblem::Gated { status },
        (404, _) if is_file => return HubProblem::NoFile { status },
        (401 | 404, _) => return HubProblem::NoRepository { status },
        _ => {}
    }
    let message: String = message.chars().filter(|c| !c.is_control()).take(200).collect();
    HubProblem::Status { host: host(url), status, message: Some(message).filter(|told| !told.is_empty()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_resolved_against_the_address_that_redirects() {
        let from = "https://huggingface.co/a/b/resolve/main/c?d";
        let to = |location| joined(from, location);
        assert_eq!(to("/x/y?z").unwrap(), "https://huggingface.co/x/y?z");
        assert_eq!(to("//cdn.example/x").unwrap(), "https://cdn.example/x");
        assert_eq!(to("https://cdn.example/x").unwrap(), "https://cdn.example/x");
        assert_eq!(to("x/y"), None);
    }

    #[test]
    fn a_server_is_told_without_a_password() {
        assert_eq!(host("https://me:secret@huggingface.co/a?b"), "huggingface.co");
        assert_eq!(host("http://127.0.0.1:80/a"), "127.0.0.1:80");
        assert_eq!(host("no address"), "no address");
        assert_eq!(host("https://me:sec ret@mirror/a"), "https://mirror/a");
        let bad = ureq::Error::BadUri("me:secret@mirror is missing scheme".to_string());
        let shown = format!("{:?}", unreachable("me:secret@mirror", bad));
        assert!(shown.contains("mirror is missing scheme") && !shown.contains("secret"), "{shown}");
    }

    #[test]
    fn a_host_a_port_and_a_scheme_make_a_server() {
        let hub = origin("https://huggingface.co/a");
        assert_eq!(hub, origin("https://HuggingFace.co/b?c"));
        for other in ["http://huggingface.co", "https://huggingface.co:8443", "https://cdn.huggingface.co"] {
            assert_ne!(hub, origin(other), "{other}");
        }
        assert_eq!(origin("huggingface.co"), None);
        let told = origin("https://Me:SeCret@HuggingFace.co:80/a").unwrap();
        assert_eq!(told, ("https".to_string(), "Me:SeCret@huggingface.co:80".to_string()));
        let target = joined("https://Me:SeCret@HuggingFace.co/a", "/b");
        assert_eq!(target.as_deref(), Some("https://Me:SeCret@huggingface.co/b"));
    }
}
