//! One file from the Hub into the cache, from where an earlier transfer broke off.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;

use hf_hub::Repo;
use sha2::{Digest, Sha256};
use ureq::http::header;

use super::client::{Client, Metadata};
use super::problem::HubProblem;
use super::settings::Settings;

/// Bytes that are read at once.
const CHUNK: usize = 1 << 18;

/// Fetches a file into `blob`, by way of `partial`. `report` is told how many bytes are there.
///
/// What `partial` holds is gone on from if the Hub says a checksum, by which damage would be found. Other files are
/// small, and begin anew.
///
/// # Errors
/// The Hub refuses, the transfer breaks off too often, or the content is not what the Hub said: then, `partial` is
/// removed.
pub(super) fn download(
    client: &Client,
    settings: &Settings,
    (repo, file, metadata): (&Repo, &str, &Metadata),
    (partial, blob): (&Path, &Path),
    report: &mut dyn FnMut(u64),
) -> Result<(), HubProblem> {
    let cache = |source| HubProblem::Cache { path: partial.to_path_buf(), source };
    let mut part = Partial::open(partial.to_path_buf()).map_err(cache)?;
    if metadata.checksum().is_none() || part.length > metadata.size {
        part.clear().map_err(cache)?;
    }
    let mut tries = 0;
    while part.length < metadata.size {
        match transfer(client, (repo, file, metadata), &mut part, report) {
            Ok(()) => {}
            Err(problem) if problem.is_passing() && tries < settings.retries => {
                tries += 1;
                sleep(settings.pause * tries);
            }
            Err(problem) => {
                if matches!(problem, HubProblem::Length { .. }) {
                    part.remove();
                }
                return Err(problem);
            }
        }
    }
    if let Some(expected) = metadata.checksum() {
        let found = part.checksum();
        if !found.eq_ignore_ascii_case(expected) {
            part.remove();
            return Err(HubProblem::Checksum { expected: expected.to_string(), found });
        }
    }
    part.file.sync_all().and_then(|()| fs::rename(partial, blob)).map_err(cache)
}

/// Transfers what is missing.
fn transfer(
    client: &Client,
    (repo, file, metadata): (&Repo, &str, &Metadata),
    part: &mut Partial,
    report: &mut dyn FnMut(u64),
) -> Result<(), HubProblem> {
    let path = part.path.clone();
    let cache = |source| HubProblem::Cache { path: path.clone(), source };
    let mut response = client.get(repo, file, part.length)?;
    let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    let begins = format!("bytes {}-", part.length);
    let is_rest = response.status() == 206
        && header(header::CONTENT_RANGE).is_some_and(|range| range.starts_with(&begins));
    if part.length > 0 && !is_rest {
        // Servers may send all of it instead, or refuse.
        let is_whole = response.status() == 200;
        part.clear().map_err(cache)?;
        if !is_whole {
            response = client.get(repo, file, 0)?;
        }
    }
    let size = metadata.size;
    if let Some(rest) = response.body().content_length() {
        let found = part.length.saturating_add(rest);
        if found != size {
            return Err(HubProblem::Length { expected: size, found });
        }
    }
    let mut reader = response.into_body().into_reader();
    let mut chunk = vec![0; CHUNK];
    loop {
        let broken = |source: io::Error, done| HubProblem::BrokenOff { done, size, source: source.into() };
        match reader.read(&mut chunk) {
            Ok(0) if part.length < size => {
                return Err(broken(io::ErrorKind::UnexpectedEof.into(), part.length));
            }
            Ok(0) => return Ok(()),
            Ok(count) => {
                part.append(&chunk[..count]).map_err(cache)?;
                if part.length > size {
                    return Err(HubProblem::Length { expected: size, found: part.length });
                }
                report(part.length);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(broken(error, part.length)),
        }
    }
}

/// A file that grows, with the checksum of what it holds.
struct Partial {
    path: PathBuf,
    file: File,
    length: u64,
    hash: Sha256,
}

impl Partial {
    /// Opens what is there, or begins.
    fn open(path: PathBuf) -> io::Result<Self> {
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
        let mut hash = Sha256::new();
        // Reading leaves the position at the end.
        let length = io::copy(&mut file, &mut hash)?;
        Ok(Self { path, file, length, hash })
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn clear(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        (self.length, self.hash) = (0, Sha256::new());
        Ok(())
    }

    /// The checksum in hexadecimal digits.
    fn checksum(&self) -> String {
        self.hash.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Removes the file. One that stays would be found damaged again.
    fn remove(&mut self) {
        let _ = self.clear().and_then(|()| fs::remove_file(&self.path));
    }
}
