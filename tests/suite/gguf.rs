//! GGUF files, byte for byte those that the writer of the Python package `gguf` makes of the same content.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use burn_peft::AdapterDirectory;
use burn_peft_llama::{GgufAdapter, GgufModel, GgufType, LlamaError};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// A base of the fixtures with the tokenizer of the GGUF fixtures, which have the only one.
fn with_tokenizer(place: &Path, base: &str) -> PathBuf {
    let directory = place.join(base);
    fs::create_dir(&directory).unwrap();
    for from in [fixture(base), fixture("gguf")] {
        for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            if !name.contains("expected") && !name.contains("gguf") && !name.ends_with(".header") {
                fs::copy(entry.path(), directory.join(name)).unwrap();
            }
        }
    }
    directory
}

/// The hash of FNV-1a, 64 bits.
fn fnv(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// Where two files part, and what is there.
#[track_caller]
fn assert_equal(found: &[u8], expected: &[u8], what: &str) {
    if let Some(at) = (0..found.len().max(expected.len())).find(|&at| found.get(at) != expected.get(at)) {
        let around = |bytes: &[u8]| {
            let end = bytes.len().min(at + 40);
            String::from_utf8_lossy(&bytes[at.saturating_sub(40).min(end)..end]).into_owned()
        };
        panic!("{what} at byte {at}: {:?}, expected {:?}", around(found), around(expected));
    }
}

#[test]
fn adapters_are_those_of_the_reference_writer() {
    let place = tempfile::tempdir().unwrap();
    for (case, base, rescaled) in [
        ("gqa-tied-qv", "gqa-tied", 0),
        ("gqa-tied-rslora", "gqa-tied", 0),
        ("mha-biased-patterns", "mha-biased", 7),
        ("qwen2-qv", "qwen2", 0),
    ] {
        let adapter = AdapterDirectory::open(fixture(case)).unwrap();
        let adapter = GgufAdapter::new(fixture(base), adapter).unwrap();
        let path = place.path().join(case);
        let size = adapter.write(&path, GgufType::F32, |_, _| {}).unwrap();
        let found = fs::read(path).unwrap();
        assert_eq!(size, found.len() as u64);
        assert_equal(&found, &fs::read(fixture(&format!("gguf/{case}.gguf"))).unwrap(), case);
        assert_eq!(adapter.num_rescaled(), rescaled, "{case}");
    }
}

#[test]
fn models_are_those_of_the_reference_writer() {
    let place = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(fixture("gguf/expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    for (case, expected) in expected.as_object().unwrap() {
        let (base, dtype) = case.split_once('.').unwrap();
        let dtype = if dtype == "f16" { GgufType::F16 } else { GgufType::F32 };
        let directory = place.path().join(base);
        let directory = if directory.exists() { directory } else { with_tokenizer(place.path(), base) };
        let model = GgufModel::open(directory, &Device::default()).unwrap();
        assert!(model.notes().is_empty(), "{:?}", model.notes());
        let path = place.path().join("model.gguf");
        let mut seen = 0;
        model.write(&path, dtype, |done, of| seen += usize::from(done <= of)).unwrap();
        assert_eq!(seen, model.num_tensors());
        let found = fs::read(&path).unwrap();
        let header = fs::read(fixture(&format!("gguf/{case}.header"))).unwrap();
        assert_equal(&found[..header.len()], &header, case);
        assert_eq!(
            (found.len() as u64, fnv(&found)),
            (expected["length"].as_u64().unwrap(), expected["fnv"].as_str().unwrap().to_string()),
            "{case}"
        );
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn what_llama_cpp_cannot_use_is_refused_for_every_adapter_that_has_it() {
    let mut refused = 0;
    for (base, case) in [
        ("gqa-tied", "gqa-tied-dora"),
        ("gqa-tied", "gqa-tied-embedding"),
        ("gqa-tied", "gqa-tied-lora-bias"),
        ("gqa-tied", "gqa-tied-save-layernorm"),
        ("gqa-tied", "gqa-tied-tokens"),
        ("mha-biased", "mha-biased-bias-all"),
        ("mha-biased", "mha-biased-save-head"),
        ("mha-biased", "gqa-tied-qv"),
    ] {
        let adapter = AdapterDirectory::open(fixture(case)).unwrap();
        let error = GgufAdapter::new(fixture(base), adapter).unwrap_err();
        assert!(matches!(error, LlamaError::NotForLlamaCpp { .. }), "{case}: {error}");
        refused += 1;
    }
    assert_eq!(refused, 8);
    for (base, case) in [("mha-biased", "mha-biased-embedding-head"), ("gqa-tied", "gqa-tied-pissa")] {
        GgufAdapter::new(fixture(base), AdapterDirectory::open(fixture(case)).unwrap()).unwrap();
    }
}
