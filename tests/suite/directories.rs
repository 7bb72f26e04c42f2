//! Adapter directories that several programs use at once: what a reader gets is one adapter whole, or none.
//!
//! The writers are processes of their own: this binary, asked for the test [`a_writer`].

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::nn::LinearConfig;
use burn::tensor::{Device, TensorData};
use burn_peft::{AdapterDirectory, LoraConfig, LoraLinear, PeftError, PeftModel};
use burn_peft_tests::parameters::parameters;
use safetensors::tensor::{Dtype, TensorView};

/// What a writer is told: the directory, the rank, and `lora_alpha`, which is also every number in its factor `B`.
const WRITER: &str = "BURN_PEFT_TEST_WRITER";

#[derive(Module, Debug)]
struct Net {
    layers: Vec<LoraLinear>,
}

fn net() -> Net {
    let layer = |_| LinearConfig::new(64, 64).init(&Device::default()).into();
    Net { layers: (0..8).map(layer).collect() }
}

/// A model with an adapter of this rank, in which `lora_alpha` and all of `B` are `mark`.
fn marked(r: usize, mark: f32) -> Net {
    let start = tempfile::tempdir().unwrap();
    let mut net = net();
    let config = LoraConfig::new(r).with_lora_alpha(f64::from(mark)).with_target_modules(["0", "3", "7"]);
    net.add_adapter("default", &config).unwrap();
    net.save_adapter("default", start.path()).unwrap();
    let (a, b) = (vec![0.0_f32; r * 64], vec![mark; r * 64]);
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let (a, b) = (bytes(&a), bytes(&b));
    let tensors = ["0", "3", "7"].into_iter().flat_map(|layer| {
        let key = |factor: &str| format!("base_model.model.layers.{layer}.lora_{factor}.weight");
        [
            (key("A"), TensorView::new(Dtype::F32, vec![r, 64], &a).unwrap()),
            (key("B"), TensorView::new(Dtype::F32, vec![64, r], &b).unwrap()),
        ]
    });
    let file = safetensors::serialize(tensors, None).unwrap();
    std::fs::write(start.path().join("adapter_model.safetensors"), file).unwrap();
    net.hotswap_adapter("default", start.path()).unwrap();
    net
}

/// Saves its adapter again and again until it is killed. It is not a test.
#[test]
#[ignore = "a process that other tests start"]
fn a_writer() {
    let Ok(told) = std::env::var(WRITER) else { return };
    let told: Vec<&str> = told.splitn(3, ' ').collect();
    let net = marked(told[0].parse().unwrap(), told[1].parse().unwrap());
    loop {
        net.save_adapter("default", told[2]).unwrap();
    }
}

struct Writer(Child);

impl Writer {
    fn start(directory: &Path, r: usize, mark: usize) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "directories::a_writer", "--ignored"]);
        command.env(WRITER, format!("{r} {mark} {}", directory.display()));
        Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Loads what is in the directory, as a model and as files, and returns its rank and mark; `None` if nothing is there.
fn read(directory: &Path) -> Option<(usize, f64)> {
    let mut net = net();
    match net.load_adapter("default", directory) {
        Err(PeftError::NoAdapter { .. }) => return None,
        Err(error) => panic!("{error}"),
        Ok(_) => {}
    }
    let config = net.adapters().remove(0).config.as_lora().unwrap().clone();
    let is_b = |path: &String| path.ends_with(".default.b");
    let factors: Vec<TensorData> =
        parameters(&net).into_iter().filter(|(path, _)| is_b(path)).map(|(_, data)| data).collect();
    assert_eq!(factors.len(), 3);
    for b in factors {
        assert_eq!(b.shape()[0], config.r);
        assert!(
            b.iter::<f64>().all(|value| value == config.lora_alpha),
            "tensors of one, configuration of another"
        );
    }
    let files = AdapterDirectory::open(directory);
    match files {
        Ok(files) => assert!(files.problems().is_empty(), "{:?}", files.problems()),
        Err(error) => assert!(matches!(error, PeftError::NoAdapter { .. }), "{error}"),
    }
    Some((config.r, config.lora_alpha))
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// Reads for some seconds while these write: rank and mark of each.
fn race(writers: [(usize, usize); 2]) {
    let directory = tempfile::tempdir().unwrap();
    marked(writers[0].0, writers[0].1 as f32).save_adapter("default", directory.path()).unwrap();
    let mut running = writers.map(|(r, mark)| Writer::start(directory.path(), r, mark));
    let (mut seen, mut reads) = ([0; 2], 0);
    let start = Instant::now();
    // Starting a process takes its time on a busy machine.
    while start.elapsed() < Duration::from_secs(4)
        || (seen.contains(&0) && start.elapsed() < Duration::from_secs(60))
    {
        reads += 1;
        let found = read(directory.path());
        if let Some(found) = found {
            let which = writers.iter().position(|(r, mark)| found == (*r, *mark as f64));
            seen[which.expect("an adapter that nobody wrote")] += 1;
        }
    }
    assert!(running.iter_mut().all(Writer::is_alive), "a writer failed");
    drop(running);
    assert!(seen.iter().all(|count| *count > 0), "{seen:?} of {reads}");
    marked(2, 3.0).save_adapter("default", directory.path()).unwrap();
    assert_eq!(names(directory.path()), FILES);
    println!("{reads} reads: {seen:?}");
}

#[test]
fn two_writers_of_different_ranks_and_a_reader() {
    race([(4, 4), (8, 8)]);
}

#[test]
fn two_writers_of_equal_shapes_and_a_reader() {
    race([(4, 4), (4, 8)]);
}

#[test]
fn a_writer_that_is_killed_leaves_one_adapter_or_none_and_nothing_that_stays() {
    let directory = tempfile::tempdir().unwrap();
    let mut left = 0;
    for i in 0..40 {
        let (r, mark) = if i % 2 == 0 { (4, 4) } else { (8, 8) };
        let writer = Writer::start(directory.path(), r, mark);
        // Long enough to be in the middle of it, at another moment each time.
        let start = Instant::now();
        while !directory.path().join(FILES[0]).exists() && start.elapsed() < Duration::from_secs(60) {
            sleep(Duration::from_micros(100));
        }
        sleep(Duration::from_micros(20_000 + 700 * i));
        drop(writer);
        left += usize::from(names(directory.path()).len() > 2);
        read(directory.path());
    }
    marked(2, 3.0).save_adapter("default", directory.path()).unwrap();
    assert_eq!(names(directory.path()), FILES);
    assert_eq!(read(directory.path()), Some((2, 3.0)));
    println!("{left} of 40 left files behind, which the next save removed");
}

#[test]
fn a_save_that_fails_leaves_the_old_adapter() {
    let directory = tempfile::tempdir().unwrap();
    marked(4, 4.0).save_adapter("default", directory.path()).unwrap();
    // No file can take the place of a directory.
    std::fs::remove_file(directory.path().join(FILES[1])).unwrap();
    std::fs::create_dir_all(directory.path().join(FILES[1]).join("inside")).unwrap();
    let error = marked(4, 4.0).save_adapter("default", directory.path()).unwrap_err();
    assert!(matches!(&error, PeftError::Io { path, .. } if path.ends_with(FILES[1])), "{error}");
    assert_eq!(names(directory.path()), FILES, "nothing is left over");
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = marked(4, 4.0).save_adapter("default", file.path()).unwrap_err();
    assert!(matches!(error, PeftError::Io { .. }), "{error}");
}
