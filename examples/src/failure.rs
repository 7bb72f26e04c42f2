//! How an error is told: what failed, why, and last what to do about it.

#![allow(clippy::print_stderr, reason = "programs talk to their users")]

use std::fmt::Write as _;
use std::process::ExitCode;

/// How a program ends: as it says, or with its error told on standard error.
pub fn exit_code(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprint!("{}", text(&error));
        ExitCode::FAILURE
    })
}

/// The messages of an error and its causes, with all hints at the end.
pub fn text(error: &anyhow::Error) -> String {
    let (mut text, mut hints) = (String::new(), String::new());
    let mut before = String::new();
    for (depth, cause) in error.chain().enumerate() {
        let cause = cause.to_string();
        // Some errors repeat their source in their own message.
        if before.contains(&cause) {
            continue;
        }
        let mut label = if depth == 0 { "error: " } else { "  because: " };
        let (told, hinted): (Vec<_>, Vec<_>) = cause.lines().partition(|line| !line.starts_with("hint:"));
        for line in told {
            let _ = writeln!(text, "{label}{line}");
            label = "  ";
        }
        for line in hinted {
            let _ = writeln!(hints, "{line}");
        }
        before.push_str(&cause);
    }
    text + &hints
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn hints_come_last() {
        let error =
            Err::<(), _>(anyhow!("no such file")).context("`a.csv` cannot be read\nhint: give a file");
        let text = text(&error.unwrap_err());
        assert_eq!(text, "error: `a.csv` cannot be read\n  because: no such file\nhint: give a file\n");
    }

    #[test]
    fn a_repeated_cause_is_told_once() {
        let error = Err::<(), _>(anyhow!("it broke")).context("cannot load: it broke").unwrap_err();
        assert_eq!(text(&error), "error: cannot load: it broke\n");
    }
}
