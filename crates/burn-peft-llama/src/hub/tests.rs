//! Fetching from a server that behaves as the Hub does.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::server::{Behaviour, COMMIT, FORMER, HubServer, NAME, Stored};
use super::settings::{Settings, Token};
use super::*;

const WEIGHTS: &str = "model.safetensors";
const SECRET: &str = "hf_secret";

/// Bytes that differ from place to place, more than one chunk of them.
fn weights() -> Vec<u8> {
    (0..700_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn file(name: &'static str, content: impl Into<Vec<u8>>) -> Stored {
    let content = content.into();
    Stored { is_large: name.ends_with(".safetensors"), name, content }
}

fn model() -> Behaviour {
    let files = vec![
        file("config.json", "{\"a\": 1}"),
        file("tokenizer.json", "{\"b\": 2}"),
        file("README.md", "no file that is of use"),
        file(WEIGHTS, weights()),
    ];
    Behaviour { files, ..Default::default() }
}

/// A server, a cache, and who asks.
struct Scene {
    server: HubServer,
    settings: Settings,
    cache: TempDir,
}

impl Scene {
    fn new(behaviour: Behaviour) -> Self {
        let (server, cache) = (HubServer::new(behaviour), tempfile::tempdir().unwrap());
        let settings = Settings {
            endpoint: server.endpoint.clone(),
            cache: cache.path().join("hub"),
            token: None,
            offline: None,
            retries: 0,
            pause: Duration::ZERO,
        };
        Self { server, settings, cache }
    }

    fn log_in(&mut self, secret: &str) {
        self.settings.token = Some(Token { secret: secret.into(), origin: "`HF_TOKEN`".into() });
    }

    fn fetch(&self, name: &str) -> Result<PathBuf, LlamaError> {
        fetch(Kind::Model, &name.parse()?, &self.settings, &mut |_| ())
    }

    /// The error with its causes, as a program prints it; the token is in none.
    #[track_caller]
    fn error(&self, name: &str) -> String {
        told(&self.fetch(name).unwrap_err())
    }

    /// The error if no request may be made.
    #[track_caller]
    fn offline_error(&self, name: &str) -> String {
        let settings = Settings { offline: Some("HF_HUB_OFFLINE"), ..self.settings.clone() };
        told(&fetch(Kind::Model, &name.parse().unwrap(), &settings, &mut |_| ()).unwrap_err())
    }

    fn root(&self) -> PathBuf {
        self.settings.cache.join("models--owner--name")
    }

    fn partial(&self) -> PathBuf {
        self.root().join("blobs").join(format!("{}.incomplete", file(WEIGHTS, weights()).etag()))
    }
}

fn told(error: &LlamaError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        assert!(!text.contains(&source.to_string()), "{source} is told twice: {text}");
        text += &format!("\nbecause: {source}");
        cause = source.source();
    }
    assert!(!text.contains(SECRET) && !format!("{error:?}").contains(SECRET), "{text}");
    assert!(text.contains("hint: "), "{text}");
    text
}

#[track_caller]
fn assert_contains(text: &str, expected: &[&str]) {
    for expected in expected {
        assert!(text.contains(expected), "{expected} in {text}");
    }
}

#[track_caller]
fn assert_complete(directory: &Path) {
    assert_eq!(fs::read(directory.join("config.json")).unwrap(), b"{\"a\": 1}");
    assert_eq!(fs::read(directory.join("tokenizer.json")).unwrap(), b"{\"b\": 2}");
    assert!(fs::read(directory.join(WEIGHTS)).unwrap() == weights());
}

#[test]
fn a_model_is_fetched_once_into_the_layout_of_the_shared_cache() {
    let scene = Scene::new(model());
    let mut seen: Vec<(String, u64, u64)> = vec![];
    let mut progress = |at: FetchProgress| seen.push((at.file.to_string(), at.done, at.total));
    let directory = fetch(Kind::Model, &NAME.parse().unwrap(), &scene.settings, &mut progress).unwrap();
    assert_complete(&directory);
    assert!(!directory.join("README.md").exists());

    let total = 16 + weights().len() as u64;
    assert!(
        seen.iter().all(|(_, _, of)| *of == total) && seen.iter().is_sorted_by_key(|at| at.1),
        "{seen:?}"
    );
    assert!(seen.len() > 4 && seen.last() == Some(&(WEIGHTS.to_string(), total, total)), "{seen:?}");

    let root = scene.root();
    assert_eq!(directory, root.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(fs::read_dir(root.join("blobs")).unwrap().count(), 3);
    let target = Path::new("../../blobs").join(file(WEIGHTS, weights()).etag());
    #[cfg(unix)]
    assert_eq!(fs::read_link(directory.join(WEIGHTS)).unwrap(), target);
    assert!(directory.join(target).is_file());

    scene.server.requests();
    scene.server.large_requests();
    assert_eq!(scene.fetch(NAME).unwrap(), directory);
    let asked = scene.server.requests();
    assert!(asked.len() == 1 && asked[0].path.contains("/revision/main"), "{asked:?}");
    // A commit cannot change, and the tag is the same one.
    assert_eq!(scene.fetch(&format!("{NAME}@{COMMIT}")).unwrap(), directory);
    assert_eq!(scene.server.requests().len(), 0);
    assert_eq!(scene.fetch(&format!("{NAME}@v1")).unwrap(), directory);
    assert_eq!(scene.fetch(&format!("{NAME}@refs/pr/1")).unwrap(), directory);
    assert_eq!(fs::read_to_string(root.join("refs/refs/pr/1")).unwrap(), COMMIT);
    assert_eq!(scene.server.large_requests().len(), 0);
}

#[test]
fn a_transfer_that_broke_off_goes_on_from_there() {
    let scene = Scene::new(Behaviour { cuts: (1, 300_000), ..model() });
    let text = scene.error(NAME);
    assert_contains(
        &text,
        &[WEIGHTS, "broke off after 300000 of 700000 bytes", "type the same command again"],
    );
    assert_eq!(fs::metadata(scene.partial()).unwrap().len(), 300_000);
    assert_eq!(scene.server.large_requests()[0].range, None);
    assert!(!scene.root().join("refs").exists(), "nothing is remembered that is not complete");

    let mut first = None;
    let mut progress = |at: FetchProgress| _ = first.get_or_insert(at.done);
    let directory = fetch(Kind::Model, &NAME.parse().unwrap(), &scene.settings, &mut progress).unwrap();
    let asked = scene.server.large_requests();
    assert!(asked.len() == 1 && asked[0].range.as_deref() == Some("bytes=300000-"), "{asked:?}");
    assert_complete(&directory);
    assert!(!scene.partial().exists());
    assert!(first > Some(300_000), "what is there counts as done: {first:?}");
}

#[test]
fn a_transfer_is_taken_up_again_within_one_call() {
    let mut scene = Scene::new(Behaviour { cuts: (2, 200_000), ..model() });
    scene.settings.retries = 2;
    assert_complete(&scene.fetch(NAME).unwrap());
    let ranges: Vec<_> = scene.server.large_requests().into_iter().map(|request| request.range).collect();
    assert_eq!(ranges, [None, Some("bytes=200000-".to_string()), Some("bytes=400000-".to_string())]);
}

#[test]
fn a_damaged_partial_file_is_found_by_its_checksum_and_removed() {
    let scene = Scene::new(Behaviour { cuts: (1, 300_000), ..model() });
    scene.error(NAME);
    let mut bytes = fs::read(scene.partial()).unwrap();
    bytes[7] ^= 1;
    fs::write(scene.partial(), bytes).unwrap();
    let text = scene.error(NAME);
    assert_contains(&text, &[WEIGHTS, "checksum", "was removed", "it fetches the file anew"]);
    assert_contains(&text, &[&file(WEIGHTS, weights()).etag()]);
    assert!(!scene.partial().exists());
    scene.server.large_requests();
    assert_complete(&scene.fetch(NAME).unwrap());
    assert_eq!(scene.server.large_requests()[0].range, None);
}

#[test]
fn a_partial_file_that_is_whole_or_too_long_is_no_obstacle() {
    for (content, asked) in [(weights(), 0), ([weights(), vec![0]].concat(), 1)] {
        let scene = Scene::new(Behaviour { cuts: (1, 1), ..model() });
        scene.error(NAME);
        scene.server.large_requests();
        fs::write(scene.partial(), content).unwrap();
        assert_complete(&scene.fetch(NAME).unwrap());
        assert_eq!(scene.server.large_requests().len(), asked);
    }
}

#[test]
fn a_server_that_sends_whole_files_only_gets_the_partial_one_replaced() {
    let scene = Scene::new(Behaviour { cuts: (1, 300_000), ignores_range: true, ..model() });
    scene.error(NAME);
    assert_complete(&scene.fetch(NAME).unwrap());
}

#[test]
fn a_wrong_length_or_checksum_is_refused_and_nothing_stays() {
    for (behaviour, expected) in [
        (Behaviour { is_short: true, ..model() }, "expected 700000 bytes, found 699999"),
        (Behaviour { is_corrupt: true, ..model() }, "expected the checksum (SHA-256)"),
    ] {
        let scene = Scene::new(behaviour);
        assert_contains(
            &scene.error(NAME),
            &["`model.safetensors` of `owner/name`", expected, "fetches the file anew"],
        );
        assert!(
            !scene.partial().exists() && !scene.root().join("snapshots").join(COMMIT).join(WEIGHTS).exists()
        );
        scene.server.change(|behaviour| (behaviour.is_short, behaviour.is_corrupt) = (false, false));
        assert_complete(&scene.fetch(NAME).unwrap());
    }
}

#[test]
fn a_gated_model_needs_the_licence_and_a_token() {
    let mut scene = Scene::new(Behaviour { token: Some(SECRET), is_closed: true, ..model() });
    let page = format!("accept the licence at {}/owner/name", scene.server.endpoint);
    let text = scene.error(NAME);
    assert_contains(&text, &["gated", "401", &page, "`export HF_TOKEN=hf_...`", "`hf auth login`"]);

    scene.log_in(SECRET);
    let text = scene.error(NAME);
    assert_contains(
        &text,
        &["gated", "403", "ask for access", "owner/name with the account of the token from `HF_TOKEN`"],
    );

    scene.log_in("hf_wrong");
    assert_contains(&scene.error(NAME), &["does not accept the token", "from `HF_TOKEN`", "`hf auth login`"]);

    scene.log_in(SECRET);
    scene.server.change(|behaviour| behaviour.is_closed = false);
    assert_complete(&scene.fetch(NAME).unwrap());
}

#[test]
fn the_token_goes_to_the_hub_and_to_no_other_server() {
    let mut scene = Scene::new(Behaviour { token: Some(SECRET), ..model() });
    scene.log_in(SECRET);
    scene.fetch(NAME).unwrap();
    let (hub, large) = (scene.server.requests(), scene.server.large_requests());
    let bearer = format!("Bearer {SECRET}");
    assert!(hub.len() >= 7 && hub.iter().all(|request| request.authorization.as_ref() == Some(&bearer)));
    assert!(!large.is_empty() && large.iter().all(|request| request.authorization.is_none()), "{large:?}");
    assert!(large.iter().all(|request| request.method == "GET"), "{large:?}");
}

#[test]
fn a_renamed_repository_is_found_and_its_redirects_keep_the_token() {
    let mut scene = Scene::new(Behaviour { token: Some(SECRET), ..model() });
    scene.log_in(SECRET);
    assert_complete(&scene.fetch(FORMER).unwrap());
    let asked = scene.server.requests();
    assert!(asked.iter().any(|request| request.path.contains(FORMER)), "{asked:?}");
    assert!(asked.iter().all(|request| request.authorization.is_some()), "{asked:?}");
}

#[test]
fn what_does_not_exist_is_told_with_what_to_check() {
    let mut scene = Scene::new(model());
    let page = format!("spelled as at {}/owner/other", scene.server.endpoint);
    assert_contains(&scene.error("owner/other"), &["no such repository", "401", &page, "HF_TOKEN"]);
    scene.log_in(SECRET);
    assert_contains(
        &scene.error("owner/other"),
        &["no such repository", "404", &page, "`HF_TOKEN` must have"],
    );
    let text = scene.error("owner/name@v2");
    assert_contains(
        &text,
        &["`owner/name@v2`", "no such revision", "behind the `@`", "leave it out for `main`"],
    );

    // Removed between the list and the fetch.
    let client = Client::new(&scene.settings);
    let id: ModelId = NAME.parse().unwrap();
    let problem = client.metadata(&id.repo(), "gone.json").unwrap_err();
    assert!(matches!(problem, HubProblem::NoFile { status: 404 }), "{problem}");
    let text = told(&hub_error(&id, Some(&scene.settings), Some("gone.json"), problem));
    assert_contains(&text, &["`gone.json` of `owner/name`", "no such file", "/owner/name/tree/main"]);
}

#[test]
fn offline_the_cache_is_used_and_nothing_is_asked() {
    let mut scene = Scene::new(model());
    scene.settings.offline = Some("HF_HUB_OFFLINE");
    let text = scene.error("owner/name@v1");
    assert_contains(&text, &["`HF_HUB_OFFLINE` is set", "`config.json`", "`unset HF_HUB_OFFLINE`"]);
    assert_contains(&text, &["`hf download owner/name --revision v1`"]);
    assert_eq!(scene.server.requests().len(), 0);

    scene.settings.offline = None;
    let directory = scene.fetch(NAME).unwrap();
    scene.server.requests();
    scene.settings.offline = Some("HF_HUB_OFFLINE");
    assert_eq!(scene.fetch(NAME).unwrap(), directory);
    fs::remove_file(directory.join(WEIGHTS)).unwrap();
    assert_contains(&scene.error(NAME), &["has no `model.safetensors`"]);
    assert_eq!(scene.server.requests().len(), 0);
}

#[test]
fn if_the_hub_cannot_be_reached_a_complete_copy_will_do() {
    let mut scene = Scene::new(model());
    // Nothing listens there.
    let nowhere = "http://127.0.0.1:1".to_string();
    scene.settings.endpoint = nowhere.clone();
    let text = scene.error(NAME);
    assert_contains(
        &text,
        &["`127.0.0.1:1` cannot be reached", "is there a network", "HF_ENDPOINT", "`hf download owner/name`"],
    );

    scene.settings.endpoint = scene.server.endpoint.clone();
    let directory = scene.fetch(NAME).unwrap();
    scene.settings.endpoint = nowhere;
    assert_eq!(scene.fetch(NAME).unwrap(), directory);

    scene.settings.endpoint = scene.server.endpoint.clone();
    scene.server.change(|behaviour| behaviour.status = Some(503));
    assert_eq!(scene.fetch(NAME).unwrap(), directory);
    fs::remove_file(directory.join(WEIGHTS)).unwrap();
    assert_contains(&scene.error(NAME), &["answers with status 503", "later"]);
    // A refusal is one, whatever is in the cache.
    scene.server.change(|behaviour| behaviour.status = Some(403));
    assert_contains(&scene.error(NAME), &["gated"]);
}

#[test]
fn an_adapter_is_fetched_and_a_model_is_not_taken_for_one() {
    let files = vec![
        file("adapter_config.json", "{}"),
        file("adapter_model.safetensors", weights()),
        file("tokenizer.json", "{}"),
    ];
    let scene = Scene::new(Behaviour { files, ..Default::default() });
    let id: ModelId = NAME.parse().unwrap();
    let directory = fetch(Kind::Adapter, &id, &scene.settings, &mut |_| ()).unwrap();
    assert!(fs::read(directory.join("adapter_model.safetensors")).unwrap() == weights());
    assert!(directory.join("adapter_config.json").is_file() && !directory.join("tokenizer.json").exists());
    assert_contains(&scene.error(NAME), &["`owner/name`", "it is an adapter", "give it as the adapter"]);
    let scene = Scene::new(model());
    let text = told(&fetch(Kind::Adapter, &id, &scene.settings, &mut |_| ()).unwrap_err());
    assert_contains(&text, &["it is a model", "give it as the model"]);
    assert_eq!(scene.server.large_requests().len(), 0);
}

#[test]
fn all_shards_of_a_model_are_fetched_and_one_that_is_nowhere_is_missed() {
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let index = format!(r#"{{"weight_map": {{"a": "{}", "b": "{}"}}}}"#, shards[0], shards[1]);
    let mut behaviour = model();
    behaviour.files.retain(|file| file.name != WEIGHTS);
    behaviour.files.push(file("model.safetensors.index.json", index));
    behaviour.files.push(file(shards[0], weights()));
    let scene = Scene::new(behaviour);
    assert_contains(
        &scene.error(NAME),
        &["names `model-00002-of-00002.safetensors`, which it does not have"],
    );
    scene.server.change(|behaviour| behaviour.files.push(file(shards[1], "the second one")));
    let directory = scene.fetch(NAME).unwrap();
    assert!(fs::read(directory.join(shards[0])).unwrap() == weights());
    assert_eq!(fs::read(directory.join(shards[1])).unwrap(), b"the second one");
}

#[test]
fn a_single_file_of_weights_needs_no_index() {
    let mut behaviour = model();
    // As mlx-lm writes it.
    let index = r#"{"weight_map": {"a": "model.safetensors"}}"#;
    behaviour.files.push(file("model.safetensors.index.json", index));
    let mut scene = Scene::new(behaviour);
    let directory = scene.fetch(NAME).unwrap();
    assert_complete(&directory);
    assert!(!directory.join("model.safetensors.index.json").exists());
    scene.settings.offline = Some("HF_HUB_OFFLINE");
    assert_eq!(scene.fetch(NAME).unwrap(), directory);
}

#[test]
fn a_shard_of_an_unusual_name_is_told_as_such() {
    let mut behaviour = model();
    behaviour.files.retain(|file| file.name != WEIGHTS);
    let index = r#"{"weight_map": {"a": "weights-1.safetensors"}}"#;
    behaviour.files.push(file("model.safetensors.index.json", index));
    behaviour.files.push(file("weights-1.safetensors", weights()));
    let text = Scene::new(behaviour).error(NAME);
    assert_contains(&text, &["`weights-1.safetensors`, which is not called", "`hf download owner/name`"]);
}

#[test]
fn an_answer_that_is_not_of_a_hub_is_told() {
    let mut scene = Scene::new(model());
    scene.server.change(|behaviour| behaviour.status = Some(200));
    assert_contains(&scene.error(NAME), &["is no list of files", "`unset HF_ENDPOINT`"]);
    scene.server.change(|behaviour| behaviour.status = Some(302));
    assert_contains(&scene.error(NAME), &["redirects to no address"]);
    scene.settings.endpoint = "no address".to_string();
    assert_contains(&scene.error(NAME), &["cannot be reached", "HF_ENDPOINT"]);

    // Nobody chose that address.
    scene.settings.endpoint = HUB.to_string();
    let problem = HubProblem::Answer { host: "huggingface.co".to_string(), what: "is empty".to_string() };
    let text = told(&hub_error(&NAME.parse().unwrap(), Some(&scene.settings), None, problem));
    assert_contains(&text, &["type the same command again later"]);
    assert!(!text.contains("HF_ENDPOINT"), "{text}");
}

#[test]
fn an_impossible_length_is_refused() {
    let scene = Scene::new(Behaviour { told_length: Some(1 << 63), ..model() });
    let text = scene.error(NAME);
    assert_contains(&text, &["has no possible length of `model.safetensors`", "`unset HF_ENDPOINT`"]);
    assert_eq!(scene.server.large_requests().len(), 0);

    // Nothing overflows by the longest one.
    let mut behaviour = Behaviour { told_length: Some(i64::MAX as u64), ..model() };
    behaviour.files.retain(|file| file.name != WEIGHTS);
    behaviour.files.push(file("model.safetensors.index.json", "{\"weight_map\": {}}"));
    for name in ["model-1.safetensors", "model-2.safetensors", "model-3.safetensors"] {
        behaviour.files.push(file(name, name));
    }
    let scene = Scene::new(behaviour);
    assert_contains(&scene.error(NAME), &["expected 9223372036854775807 bytes, found 19"]);
}

#[test]
fn a_password_in_the_endpoint_is_sent_and_not_shown() {
    let mut scene = Scene::new(model());
    scene.settings.endpoint = scene.server.endpoint.replace("http://", "http://me:SeCret@");
    // The former name is redirected.
    assert_complete(&scene.fetch(FORMER).unwrap());
    let asked = scene.server.requests();
    let basic = Some("Basic bWU6U2VDcmV0".to_string());
    assert!(asked.iter().all(|request| request.authorization == basic), "{asked:?}");
    assert!(scene.server.large_requests().iter().all(|request| request.authorization.is_none()));

    let not_shown = |text: String, expected: &str| {
        assert_contains(&text, &[expected]);
        assert!(!text.to_lowercase().contains("cret"), "{text}");
    };
    let page = format!("spelled as at {}/owner/other", scene.server.endpoint);
    not_shown(scene.error("owner/other"), &page);
    scene.server.change(|behaviour| behaviour.status = Some(200));
    not_shown(scene.error(NAME), &format!("is {} the address of a Hub?", scene.server.endpoint));
    for endpoint in ["http://me:SeCret@127.0.0.1:1", "http://me:Se Cret@mirror", "me:SeCret@mirror"] {
        scene.settings.endpoint = endpoint.to_string();
        not_shown(scene.error(NAME), "cannot be reached");
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let scene = Scene::new(model());
    fs::write(scene.cache.path().join("hub"), "a file").unwrap();
    assert_contains(&scene.error(NAME), &["cannot write", "in the cache", "`export HF_HUB_CACHE=/a/folder`"]);
}

/// For a file system without links.
fn no_link(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

#[test]
fn without_links_a_file_is_copied_as_a_whole() {
    let scene = Scene::new(model());
    let directory = scene.fetch(NAME).unwrap();
    let cached = CachedRepo::new(&scene.settings.cache, &NAME.parse().unwrap());
    let etag = file(WEIGHTS, weights()).etag();
    let pointer = directory.join(WEIGHTS);
    let interrupted = directory.join("model.safetensors.incomplete");

    fs::remove_file(&pointer).unwrap();
    fs::write(&interrupted, "half of it").unwrap();
    assert_contains(&scene.offline_error(NAME), &["has no `model.safetensors`"]);
    cached.link_by(no_link, &etag, COMMIT, WEIGHTS).unwrap();
    assert_complete(&directory);
    assert!(!fs::symlink_metadata(&pointer).unwrap().is_symlink() && !interrupted.exists());

    // Nothing stays of a copy that fails.
    fs::remove_file(&pointer).unwrap();
    fs::remove_file(cached.blob(&etag)).unwrap();
    let problem = cached.link_by(no_link, &etag, COMMIT, WEIGHTS).unwrap_err();
    assert!(matches!(&problem, HubProblem::Cache { path, .. } if *path == pointer), "{problem}");
    assert!(!pointer.exists() && !interrupted.exists());
}

#[test]
fn a_link_that_another_program_makes_first_is_kept_and_so_is_its_blob() {
    let scene = Scene::new(model());
    let directory = scene.fetch(NAME).unwrap();
    let cached = CachedRepo::new(&scene.settings.cache, &NAME.parse().unwrap());
    let etag = file(WEIGHTS, weights()).etag();
    fs::remove_file(directory.join(WEIGHTS)).unwrap();
    let other = |_: &Path, _: &Path| -> std::io::Result<()> {
        cached.link(&etag, COMMIT, WEIGHTS).unwrap();
        Err(std::io::ErrorKind::AlreadyExists.into())
    };
    cached.link_by(other, &etag, COMMIT, WEIGHTS).unwrap();
    assert_complete(&directory);
}

#[test]
fn a_copy_without_its_small_files_is_not_taken_as_complete() {
    let mut behaviour = Behaviour { cuts: (1, 3), ..model() };
    // Transfers of large files are cut: of this one alone, which the list has last.
    behaviour.files.push(file("tokenizer_config.json", "{\"c\": 3}"));
    for file in &mut behaviour.files {
        file.is_large = file.name == "tokenizer_config.json";
    }
    let scene = Scene::new(behaviour);
    let commit = format!("{NAME}@{COMMIT}");
    assert_contains(&scene.error(&commit), &["`tokenizer_config.json` of", "broke off after 3 of 8 bytes"]);
    assert_contains(&scene.offline_error(&commit), &["has no `config.json`"]);

    // Neither does the copy of a commit do without a request.
    let directory = scene.fetch(&commit).unwrap();
    assert_complete(&directory);
    assert_eq!(fs::read(directory.join("tokenizer_config.json")).unwrap(), b"{\"c\": 3}");
}

#[test]
fn two_at_once_fetch_each_file_once() {
    let scene = Scene::new(model());
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..4).map(|_| scope.spawn(|| scene.fetch(NAME))).collect();
        calls.into_iter().for_each(|call| assert_complete(&call.join().unwrap().unwrap()));
    });
    assert_eq!(scene.server.large_requests().len(), 1);
}

#[test]
fn a_file_that_another_program_fetches_is_waited_for_with_its_progress() {
    let scene = Scene::new(model());
    let id: ModelId = NAME.parse().unwrap();
    let other = CachedRepo::new(&scene.settings.cache, &id);
    let mut lock = Some(other.lock(&file(WEIGHTS, weights()).etag(), || ()).unwrap());
    fs::write(scene.partial(), &weights()[..5]).unwrap();
    // The other program ends as soon as its part is told.
    let mut progress = |at: FetchProgress| {
        if at.done == 16 + 5 {
            lock = None;
        }
    };
    assert_complete(&fetch(Kind::Model, &id, &scene.settings, &mut progress).unwrap());
    assert!(lock.is_none());
    assert_eq!(scene.server.large_requests()[0].range.as_deref(), Some("bytes=5-"));
}

#[test]
fn ids_are_an_owner_and_a_name_with_an_optional_revision() {
    let id: ModelId = "meta-llama/Llama-3.2-1B-Instruct".parse().unwrap();
    assert_eq!((id.name.as_str(), &id.revision), ("meta-llama/Llama-3.2-1B-Instruct", &None));
    let id: ModelId = "a_b/c.d@refs/pr/1".parse().unwrap();
    assert_eq!((id.name.as_str(), id.revision.as_deref()), ("a_b/c.d", Some("refs/pr/1")));
    assert_eq!(id.to_string(), "a_b/c.d@refs/pr/1");
    for bad in
        ["", "gpt2", "a/b/c", "/a", "a/", "../b", "a/..", "./models", "a b/c", "a/b@", "a/b@../x", "a/b@x//y"]
    {
        let error = bad.parse::<ModelId>();
        assert!(matches!(error, Err(LlamaError::ModelId { model }) if model == bad), "{bad}");
    }
}

#[test]
fn a_directory_is_returned_and_a_mistyped_one_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(resolve(dir.path().to_str().unwrap(), |_| ()).unwrap(), dir.path());
    assert_eq!(resolve_adapter(dir.path().to_str().unwrap(), |_| ()).unwrap(), dir.path());
    let missing = dir.path().join("missing");
    let error = resolve(missing.to_str().unwrap(), |_| ()).unwrap_err().to_string();
    assert!(error.contains("missing") && error.contains("expected a directory"), "{error}");
}

/// `BURN_PEFT_PYTHON` names a Python that has huggingface_hub.
#[test]
#[ignore = "needs a Python with huggingface_hub, see BURN_PEFT_PYTHON"]
fn the_cache_is_shared_with_python() {
    let python = std::env::var("BURN_PEFT_PYTHON").expect("BURN_PEFT_PYTHON is not set");
    let snapshot = |scene: &Scene, code: &str, offline: &str| {
        let output = std::process::Command::new(&python)
            .args(["-c", code])
            .env("HF_HOME", scene.cache.path())
            .env("HF_ENDPOINT", &scene.server.endpoint)
            .env("HF_HUB_OFFLINE", offline)
            .env("HF_HUB_DISABLE_TELEMETRY", "1")
            .env_remove("HF_HUB_CACHE")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
    };
    // What was fetched here.
    let scene = Scene::new(model());
    let directory = scene.fetch(NAME).unwrap();
    scene.server.requests();
    let code = "from huggingface_hub import hf_hub_download, snapshot_download
print(snapshot_download('owner/name', local_files_only=True))
assert open(hf_hub_download('owner/name', 'model.safetensors', local_files_only=True), 'rb').read()";
    assert_eq!(snapshot(&scene, code, "1"), directory);
    assert_eq!(scene.server.requests().len(), 0);
    // Online, Python finds nothing to fetch but the file that is of no use here.
    let code = "from huggingface_hub import snapshot_download; print(snapshot_download('owner/name'))";
    scene.server.large_requests();
    assert_eq!(snapshot(&scene, code, "0"), directory);
    assert_eq!(scene.server.large_requests().len(), 0);
    assert!(directory.join("README.md").is_file());

    // What Python fetched.
    let mut scene = Scene::new(model());
    let directory = snapshot(&scene, code, "0");
    assert_complete(&directory);
    scene.server.requests();
    scene.settings.offline = Some("HF_HUB_OFFLINE");
    assert_eq!(scene.fetch(NAME).unwrap(), directory);
    assert_eq!(scene.server.requests().len(), 0);
    scene.settings.offline = None;
    assert_eq!(scene.fetch(NAME).unwrap(), directory);
    assert_eq!(scene.server.requests().len(), 1, "nothing is fetched again");
}
