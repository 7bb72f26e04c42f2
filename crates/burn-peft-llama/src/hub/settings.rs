//! What the environment says about the Hub: where it is, who asks, where files are kept.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fmt, fs};

use super::HUB;
use super::problem::HubProblem;

/// The values that Python's huggingface_hub takes for yes, in any case.
const YES: [&str; 4] = ["1", "ON", "YES", "TRUE"];

/// Where the Hub is, who asks, and where files are kept.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// Address of the Hub, without a slash at the end.
    pub(super) endpoint: String,
    /// Folder of the cache, which has a folder for each repository.
    pub(super) cache: PathBuf,
    pub(super) token: Option<Token>,
    /// The variable that forbids requests, if one does.
    pub(super) offline: Option<&'static str>,
    /// How often a transfer that breaks off is taken up again before that is an error.
    pub(super) retries: u32,
    /// How long to wait before the first of these; before each further one, as long again.
    pub(super) pause: Duration,
}

/// A secret, with the place that it comes from.
#[derive(Clone)]
pub(super) struct Token {
    pub(super) secret: String,
    /// A variable or a file, in backticks.
    pub(super) origin: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token from {}", self.origin)
    }
}

impl Settings {
    /// The settings of this process.
    ///
    /// # Errors
    /// There is no place for the cache.
    pub(super) fn from_env() -> Result<Self, HubProblem> {
        Self::new(|name| env::var_os(name), env::home_dir())
    }

    /// The settings by the variables that `lookup` knows; an empty one counts as none.
    fn new(lookup: impl Fn(&str) -> Option<OsString>, home: Option<PathBuf>) -> Result<Self, HubProblem> {
        let home = home.filter(|home| !home.as_os_str().is_empty());
        let text = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let path = |name: &str| text(name).map(|value| in_home(value.into(), home.as_deref()));
        let caches = path("XDG_CACHE_HOME").or_else(|| Some(home.as_ref()?.join(".cache")));
        let hf_home = path("HF_HOME").or_else(|| Some(caches?.join("huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let cache = cache.or_else(|| Some(hf_home.as_ref()?.join("hub")));
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(hf_home.as_ref()?.join("token")));

        let from_variable = |name: &str| {
            let value = text(name)?;
            Token::new(&value.to_string_lossy(), format!("the environment variable `{name}`"))
        };
        let from_file = || {
            let file = token_file?;
            Token::new(&fs::read_to_string(&file).ok()?, format!("the file `{}`", file.display()))
        };
        let token = from_variable("HF_TOKEN").or_else(|| from_variable("HUGGING_FACE_HUB_TOKEN"));
        let is_yes = |name: &&str| {
            text(name).is_some_and(|value| YES.contains(&&*value.to_string_lossy().to_uppercase()))
        };
        let endpoint = text("HF_ENDPOINT").map(|value| value.to_string_lossy().into_owned());
        Ok(Self {
            endpoint: endpoint.as_deref().unwrap_or(HUB).trim_end_matches('/').to_string(),
            cache: cache.ok_or(HubProblem::NoCacheFolder)?,
            token: token.or_else(from_file),
            offline: ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(is_yes),
            retries: 4,
            pause: Duration::from_secs(1),
        })
    }
}

impl Token {
    fn new(text: &str, origin: String) -> Option<Self> {
        let secret = text.trim().to_string();
        (!secret.is_empty()).then_some(Self { secret, origin })
    }
}

/// A URL as it may be shown: without a user and a password. What stands before the last `@` counts as these, since
/// people forget to encode a password.
pub(super) fn without_user(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").map_or((None, url), |(scheme, rest)| (Some(scheme), rest));
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    scheme.map_or_else(|| rest.to_string(), |scheme| format!("{scheme}://{rest}"))
}

/// `path`, where a `~` at its beginning is the home directory: a shell does not replace it in every place.
fn in_home(path: PathBuf, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Settings {
        let lookup = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into());
        Settings::new(lookup, Some("/home/me".into())).unwrap()
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        let cache = |variables: &[(&str, &str)]| settings(variables).cache;
        assert_eq!(cache(&[]), Path::new("/home/me/.cache/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/hf")]), Path::new("/home/me/hf/hub"));
        let both = [("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")];
        assert_eq!(cache(&both), Path::new("/new"));
        assert_eq!(cache(&both[..2]), Path::new("/old"));
        assert_eq!(cache(&[("HF_HOME", "")]), Path::new("/home/me/.cache/huggingface/hub"));
        let homeless = Settings::new(|_| None, Some(PathBuf::new()));
        assert!(matches!(homeless, Err(HubProblem::NoCacheFolder)));
    }

    #[test]
    fn the_token_comes_from_the_variable_before_the_file_and_is_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let (home, other) = (dir.path().to_str().unwrap(), dir.path().join("other"));
        fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        fs::write(&other, "hf_other").unwrap();
        let secret = |variables: &[(&str, &str)]| settings(variables).token.map(|token| token.secret);
        let (in_home, path) = (("HF_HOME", home), ("HF_TOKEN_PATH", other.to_str().unwrap()));
        assert_eq!(secret(&[]), None);
        assert_eq!(secret(&[in_home]).unwrap(), "hf_file");
        assert_eq!(secret(&[in_home, path]).unwrap(), "hf_other");
        assert_eq!(secret(&[in_home, path, ("HF_TOKEN", " hf_variable ")]).unwrap(), "hf_variable");
        assert_eq!(secret(&[in_home, ("HF_TOKEN", " ")]).unwrap(), "hf_file");
        assert_eq!(secret(&[("HUGGING_FACE_HUB_TOKEN", "hf_old")]).unwrap(), "hf_old");

        let shown = format!("{:?}", settings(&[("HF_TOKEN", "hf_secret")]));
        assert!(shown.contains("`HF_TOKEN`") && !shown.contains("hf_secret"), "{shown}");
    }

    #[test]
    fn a_url_is_shown_without_a_user_and_a_password() {
        for (url, shown) in [
            ("https://me:secret@mirror/a", "https://mirror/a"),
            ("https://me:sec/r@et@mirror:80", "https://mirror:80"),
            ("me:secret@mirror", "mirror"),
            ("https://huggingface.co", "https://huggingface.co"),
            ("no address", "no address"),
        ] {
            assert_eq!(without_user(url), shown);
        }
    }

    #[test]
    fn offline_is_any_yes_and_the_endpoint_ends_without_a_slash() {
        for (value, offline) in [("1", true), ("on", true), ("Yes", true), ("TRUE", true), ("0", false)] {
            assert_eq!(settings(&[("HF_HUB_OFFLINE", value)]).offline.is_some(), offline, "{value}");
        }
        let transformers = settings(&[("HF_HUB_OFFLINE", ""), ("TRANSFORMERS_OFFLINE", "1")]);
        assert_eq!(transformers.offline, Some("TRANSFORMERS_OFFLINE"));
        assert_eq!(settings(&[]).endpoint, "https://huggingface.co");
        assert_eq!(settings(&[("HF_ENDPOINT", "http://localhost:80/")]).endpoint, "http://localhost:80");
    }
}
