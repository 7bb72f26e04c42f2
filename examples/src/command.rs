//! The command that the user ran, as a shell runs it again.

use std::ffi::OsString;

/// The command of the example `name` with these arguments and the features it was built with.
pub fn text(name: &str, arguments: impl Iterator<Item = OsString>) -> String {
    let features = [
        ("cuda", cfg!(feature = "cuda")),
        ("metal", cfg!(feature = "metal")),
        ("rocm", cfg!(feature = "rocm")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("wgpu", cfg!(feature = "wgpu")),
    ];
    let built_in: Vec<&str> = features.iter().filter(|feature| feature.1).map(|feature| feature.0).collect();
    let mut words = vec!["cargo run --release".to_string()];
    if !built_in.is_empty() {
        words.push(format!("--features {}", built_in.join(",")));
    }
    words.push(format!("--example {name}"));
    let mut arguments = arguments.map(|word| quoted(&word.to_string_lossy())).peekable();
    if arguments.peek().is_some() {
        words.push("--".into());
    }
    words.extend(arguments);
    words.join(" ")
}

/// A word as a shell reads it: in quotes if any of its letters could mean something.
pub fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./,=:@%+".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(words: &[&str]) -> String {
        text("pokemon", words.iter().map(OsString::from))
    }

    #[test]
    fn words_are_quoted_where_a_shell_would_change_them() {
        assert!(of(&[]).ends_with(" --example pokemon"));
        let text = of(&["--system", "What's it?\n$5", "--data", "a/b-c.csv", "--arms", "lora,full", ""]);
        assert!(
            text.ends_with("-- --system 'What'\\''s it?\n$5' --data a/b-c.csv --arms lora,full ''"),
            "{text}"
        );
    }

    #[test]
    fn features_are_named_if_there_are_any() {
        let are_some = cfg!(any(
            feature = "cuda",
            feature = "metal",
            feature = "rocm",
            feature = "vulkan",
            feature = "wgpu"
        ));
        assert_eq!(of(&[]).starts_with("cargo run --release --features "), are_some);
        assert!(are_some || of(&[]) == "cargo run --release --example pokemon");
    }
}
