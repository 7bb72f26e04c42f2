//! Progress of long work: a bar on a terminal, plain lines otherwise.

use std::cell::Cell;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Time between two plain lines.
const QUIET: Duration = Duration::from_secs(10);

/// Progress of `total` steps of one kind.
pub struct Progress {
    bar: ProgressBar,
    title: String,
    total: usize,
    start: Instant,
    /// When the last plain line was printed; the start, if none was.
    last: Cell<Instant>,
}

impl Progress {
    /// Starts to show progress; the bar appears on standard error.
    pub fn new(title: &str, total: usize) -> Self {
        let bar = ProgressBar::new(total as u64);
        let template =
            "{prefix:>24.cyan} {wide_bar:.cyan/238} {pos:>5}/{len} {elapsed_precise} (left {eta}) {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━━╌"));
        }
        bar.set_prefix(title.to_string());
        Self { bar, title: title.into(), total, start: Instant::now(), last: Cell::new(Instant::now()) }
    }

    /// Shows that `done` steps are done.
    pub fn report(&self, done: usize, message: &str) {
        self.bar.set_position(done as u64);
        self.bar.set_message(message.to_string());
        // Work that is over at once needs no line.
        let over = done == self.total && self.start.elapsed() >= QUIET;
        if self.bar.is_hidden() && (over || self.last.get().elapsed() >= QUIET) {
            self.last.set(Instant::now());
            let seconds = self.start.elapsed().as_secs_f64();
            println!("{}: {done}/{} in {seconds:.0} s {message}", self.title, self.total);
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Progress of a download, on standard error: standard output may be the result of the program.
pub struct Transfer {
    bar: ProgressBar,
    title: String,
    start: Instant,
    /// When the last plain line was printed; the start, if none was.
    last: Cell<Instant>,
}

impl Transfer {
    /// Nothing is shown before the first report.
    pub fn new(title: &str) -> Self {
        let bar = ProgressBar::new(0);
        let template =
            "{prefix:.cyan} {wide_bar:.cyan/238} {bytes}/{total_bytes} {bytes_per_sec} (left {eta}) {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━━╌"));
        }
        bar.set_prefix(title.to_string());
        Self { bar, title: title.into(), start: Instant::now(), last: Cell::new(Instant::now()) }
    }

    /// Shows that `done` of `total` bytes are there, and that `file` is being fetched.
    pub fn report(&self, file: &str, done: u64, total: u64) {
        let is_first = self.bar.length() != Some(total);
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.bar.set_message(file.to_string());
        if is_first {
            // What an earlier run fetched says nothing about the speed.
            self.bar.reset_eta();
        }
        let over = done == total && self.start.elapsed() >= QUIET;
        if self.bar.is_hidden() && (over || self.last.get().elapsed() >= QUIET) {
            self.last.set(Instant::now());
            let seconds = self.start.elapsed().as_secs_f64();
            let (done, total) = (HumanBytes(done), HumanBytes(total));
            eprintln!("{}: {done} of {total} in {seconds:.0} s, {file}", self.title);
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
