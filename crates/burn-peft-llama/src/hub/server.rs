//! A small server on the loopback address that behaves as the Hub does, with a second one for large files.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use sha2::{Digest, Sha256};

/// The commit of the branch `main` and the tag `v1`.
pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The repository that is there.
pub(super) const NAME: &str = "owner/name";
/// What it was called before.
pub(super) const FORMER: &str = "owner/former";

/// What was asked.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) range: Option<String>,
    pub(super) authorization: Option<String>,
}

/// A file of the repository.
#[derive(Clone)]
pub(super) struct Stored {
    pub(super) name: &'static str,
    pub(super) content: Vec<u8>,
    /// Large files have their SHA-256 as etag and are redirected to the other server.
    pub(super) is_large: bool,
}

/// What the servers do.
#[derive(Clone, Default)]
pub(super) struct Behaviour {
    pub(super) files: Vec<Stored>,
    /// The token that is asked for.
    pub(super) token: Option<&'static str>,
    /// The account of the token has no access.
    pub(super) is_closed: bool,
    /// How many transfers of large files are cut, and after how many bytes.
    pub(super) cuts: (usize, usize),
    /// Large files come with other bytes than their checksum says.
    pub(super) is_corrupt: bool,
    /// Large files come shorter than the Hub says.
    pub(super) is_short: bool,
    /// The length of large files that the Hub says, if it is a wrong one.
    pub(super) told_length: Option<u64>,
    /// Parts of files are not sent, only whole ones.
    pub(super) ignores_range: bool,
    /// The status of every answer, if it is always the same.
    pub(super) status: Option<u16>,
}

struct State {
    behaviour: Behaviour,
    requests: Vec<Request>,
    large_requests: Vec<Request>,
}

/// The two servers. They run until the process ends.
pub(super) struct HubServer {
    pub(super) endpoint: String,
    state: Arc<Mutex<State>>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    cut: Option<usize>,
}

impl Answer {
    fn new(status: u16, headers: &[(&'static str, &str)], body: impl Into<Vec<u8>>) -> Self {
        let headers = headers.iter().map(|(name, value)| (*name, value.to_string())).collect();
        Self { status, headers, body: body.into(), cut: None }
    }

    fn refusal(status: u16, code: &str, message: &str) -> Self {
        Self::new(status, &[("x-error-code", code), ("x-error-message", message)], "{}")
    }

    /// The bytes that were asked for.
    fn content(content: &[u8], request: &Request, headers: &[(&'static str, &str)]) -> Self {
        let start = request.range.as_ref().and_then(|range| {
            let (start, _) = range.strip_prefix("bytes=")?.split_once('-')?;
            start.parse::<usize>().ok()
        });
        let length = content.len();
        match start {
            None => Self::new(200, headers, content),
            Some(start) if start >= length => Self::new(416, headers, ""),
            Some(start) => {
                let range = format!("bytes {start}-{}/{length}", length - 1);
                Self::new(206, &[headers, &[("content-range", range.as_str())]].concat(), &content[start..])
            }
        }
    }
}

impl HubServer {
    pub(super) fn new(behaviour: Behaviour) -> Self {
        let state = State { behaviour, requests: vec![], large_requests: vec![] };
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        let large = listen(move |request| {
            let mut state = shared.lock().unwrap();
            state.large_requests.push(request.clone());
            state.behaviour.large_file(request)
        });
        let shared = state.clone();
        let endpoint = listen(move |request| {
            let mut state = shared.lock().unwrap();
            state.requests.push(request.clone());
            state.behaviour.hub(request, &large)
        });
        Self { endpoint, state }
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.state.lock().unwrap().behaviour);
    }

    /// What was asked of the Hub since the last call.
    pub(super) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    /// What was asked of the server of large files since the last call.
    pub(super) fn large_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().large_requests)
    }
}

impl Stored {
    pub(super) fn etag(&self) -> String {
        let hash: String = Sha256::digest(&self.content).iter().map(|byte| format!("{byte:02x}")).collect();
        // The Hub has Git's SHA-1 for small files: also 40 digits by which two contents differ.
        if self.is_large { hash } else { hash[..40].to_string() }
    }

    /// What a listing says of it, which only Python asks for.
    fn entry(&self) -> serde_json::Value {
        let size = self.content.len();
        let mut entry =
            serde_json::json!({"type": "file", "path": self.name, "size": size, "oid": &self.etag()[..40]});
        if self.is_large {
            entry["lfs"] = serde_json::json!({"oid": self.etag(), "size": size, "pointerSize": 130});
        }
        entry
    }
}

impl Behaviour {
    fn hub(&self, request: &Request, large: &str) -> Answer {
        if let Some(status) = self.status {
            return Answer::new(status, &[], "");
        }
        let path = request.path.split('?').next().unwrap();
        let is_known = path.starts_with(&format!("/api/models/{NAME}/"))
            || path.starts_with(&format!("/{NAME}/resolve/"));
        let given = request.authorization.as_ref();
        if let Some(token) = self.token {
            match given {
                Some(given) if *given != format!("Bearer {token}") => {
                    return Answer::refusal(401, "", "Invalid credentials in Authorization header");
                }
                Some(_) if self.is_closed => return Answer::refusal(403, "GatedRepo", "Ask for access."),
                Some(_) => {}
                None => return Answer::refusal(401, "GatedRepo", "Access to it is restricted."),
            }
        }
        if path.contains(FORMER) {
            return Answer::new(307, &[("location", &request.path.replace(FORMER, NAME))], "");
        }
        match (is_known, given) {
            (false, None) => return Answer::refusal(401, "RepoNotFound", "Repository not found"),
            (false, Some(_)) => return Answer::refusal(404, "RepoNotFound", "Repository not found"),
            (true, _) => {}
        }
        let no_revision = || Answer::refusal(404, "RevisionNotFound", "Invalid rev id");
        let is_revision = |revision: &str| ["main", "v1", "refs%2Fpr%2F1", COMMIT].contains(&revision);
        if let Some((_, revision)) = path.split_once("/revision/") {
            if !is_revision(revision) {
                return no_revision();
            }
            let siblings: Vec<_> =
                self.files.iter().map(|file| serde_json::json!({"rfilename": file.name})).collect();
            let info = serde_json::json!({"id": NAME, "sha": COMMIT, "siblings": siblings});
            return Answer::new(200, &[("content-type", "application/json")], info.to_string());
        }
        if path.contains("/tree/") {
            let entries: Vec<_> = self.files.iter().map(Stored::entry).collect();
            let entries = serde_json::Value::Array(entries);
            return Answer::new(200, &[("content-type", "application/json")], entries.to_string());
        }
        let Some((revision, name)) = path.split_once("/resolve/").and_then(|(_, rest)| rest.split_once('/'))
        else {
            return Answer::new(404, &[], "");
        };
        if !is_revision(revision) {
            return no_revision();
        }
        let Some(file) = self.files.iter().find(|file| file.name == name) else {
            return Answer::refusal(404, "EntryNotFound", "Entry not found");
        };
        let etag = format!("\"{}\"", file.etag());
        if !file.is_large {
            let headers = [("x-repo-commit", COMMIT), ("etag", &*etag)];
            return Answer::content(&file.content, request, &headers);
        }
        let size = self.told_length.map_or(file.content.len().to_string(), |length| length.to_string());
        let location = format!("{large}/{}", file.etag());
        let headers = [
            ("x-repo-commit", COMMIT),
            ("x-linked-etag", &*etag),
            ("x-linked-size", &*size),
            ("location", &*location),
        ];
        Answer::new(302, &headers, "")
    }

    fn large_file(&mut self, request: &Request) -> Answer {
        let etag = request.path.trim_start_matches('/');
        let Some(file) = self.files.iter().find(|file| file.is_large && file.etag() == etag) else {
            return Answer::new(403, &[], "");
        };
        let mut content = file.content.clone();
        if self.is_corrupt {
            content[0] ^= 1;
        }
        if self.is_short {
            content.pop();
        }
        let mut request = request.clone();
        request.range = request.range.filter(|_| !self.ignores_range);
        let mut answer = Answer::content(&content, &request, &[]);
        let (times, bytes) = &mut self.cuts;
        if *times > 0 {
            *times -= 1;
            answer.cut = Some(*bytes);
        }
        answer
    }
}

/// Answers requests on a port of its own; the result is the address.
fn listen(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let answer = answer.clone();
            // A client that goes away is no failure.
            thread::spawn(move || stream.and_then(|stream| serve(stream, &*answer)));
        }
    });
    address
}

/// One request, one answer, and the connection is closed.
fn serve(mut stream: TcpStream, answer: &dyn Fn(&Request) -> Answer) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_string);
    let mut request = Request {
        method: words.next().unwrap_or_default(),
        path: words.next().unwrap_or_default(),
        range: None,
        authorization: None,
    };
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { break };
        match &*name.to_lowercase() {
            "range" => request.range = Some(value.trim().to_string()),
            "authorization" => request.authorization = Some(value.trim().to_string()),
            _ => {}
        }
    }
    let answer = answer(&request);
    let mut head = format!("HTTP/1.1 {} Told\r\nconnection: close\r\n", answer.status);
    head += &format!("content-length: {}\r\n", answer.body.len());
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method != "HEAD" {
        let end = answer.cut.unwrap_or(answer.body.len()).min(answer.body.len());
        stream.write_all(&answer.body[..end])?;
    }
    stream.flush()
}
