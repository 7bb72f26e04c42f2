//! The guide: every page is in its table of contents, and every link leads somewhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The targets of the links in a text of Markdown, without those in code.
fn links(text: &str) -> Vec<String> {
    let mut in_code = false;
    let prose = text.lines().filter(|line| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        !is_fence && !in_code
    });
    let prose: String = prose.collect::<Vec<_>>().join("\n");
    let parts = prose.split("](").skip(1);
    parts.filter_map(|part| part.split_once(')')).map(|(target, _)| target.to_string()).collect()
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    let guide = root().join("docs/src");
    let listed: BTreeSet<String> =
        links(&fs::read_to_string(guide.join("SUMMARY.md")).unwrap()).into_iter().collect();
    let pages = fs::read_dir(&guide).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let pages: BTreeSet<String> =
        pages.filter(|name| name.ends_with(".md") && name != "SUMMARY.md").collect();
    assert_eq!(pages, listed);
}

#[test]
fn links_lead_to_files() {
    let guide = fs::read_dir(root().join("docs/src")).unwrap().map(|entry| entry.unwrap().path());
    let top = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].map(|name| root().join(name));
    let mut count = 0;
    for page in guide.filter(|path| path.extension().is_some_and(|end| end == "md")).chain(top) {
        let text = fs::read_to_string(&page).unwrap();
        for link in links(&text) {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            count += 1;
            assert!(page.parent().unwrap().join(file).exists(), "{}: `{link}`", page.display());
        }
    }
    assert!(count > 30, "{count} links");
}
