//! The guide's scenario and the examples are valid.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{fs, path::Path};

use gauntlet_scenario::validate;

fn top() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

#[test]
fn scenario_of_the_guide_is_valid() {
    let guide = fs::read_to_string(top().join("docs/scenarios.md")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (start, name) in [("cat > serve.sh <<'EOF'\n", "serve.sh"), ("cat > scenario.yaml <<'EOF'\n", "scenario.yaml")]
    {
        let (_, rest) = guide.split_once(start).expect("the guide has no here-document for the file");
        let (text, _) = rest.split_once("   EOF\n").expect("the here-document has no end");
        let text: String =
            text.lines().map(|line| line.strip_prefix("   ").unwrap_or(line).to_owned() + "\n").collect();
        fs::write(dir.path().join(name), text).unwrap();
    }
    let report = validate(dir.path()).unwrap();
    assert!(report.is_valid() && report.warnings.is_empty(), "{report:?}");
}

#[test]
fn examples_are_valid() {
    let mut seen = 0;
    for example in fs::read_dir(top().join("examples")).unwrap() {
        let dir = example.unwrap().path().join("scenario");
        let report = validate(&dir).unwrap();
        assert!(report.is_valid(), "{}: {report:?}", dir.display());
        seen += 1;
    }
    assert!(seen >= 2);
}
