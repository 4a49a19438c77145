//! The credential files change while the manager runs.

use super::*;

fn accepts(credentials: &Credentials, byte: u8) -> bool {
    credentials.by_header(&format!("Bearer {}", text(&token(byte))).parse().unwrap()).is_ok()
}

#[test]
fn removed_token_is_refused_after_a_reload_and_a_wrong_file_changes_nothing() {
    let files = Files::new();
    let credentials = files.credentials();
    let kept = std::fs::read_to_string(files.tokens()).unwrap();
    let without_first: String = kept.split_inclusive('\n').skip(1).collect();
    assert!(accepts(&credentials, 1) && accepts(&credentials, 2));
    std::fs::write(files.tokens(), &without_first).unwrap();
    credentials.reload();
    assert!(!accepts(&credentials, 1) && accepts(&credentials, 2));

    let logs = Logs::default();
    logs.record(|| {
        std::fs::write(files.tokens(), format!("{kept}{{\"id\":7}}")).unwrap();
        credentials.reload();
        credentials.reload();
        std::fs::remove_file(files.tokens()).unwrap();
        credentials.reload();
        credentials.reload();
    });
    assert!(!accepts(&credentials, 1) && accepts(&credentials, 2));
    assert_eq!((logs.lines().len(), logs.containing("line 6: id: ")), (2, 1), "{:?}", logs.lines());
    assert!(!logs.lines().concat().contains("sha256"));

    std::fs::write(files.tokens(), &kept).unwrap();
    credentials.reload();
    assert!(accepts(&credentials, 1));
}

#[tokio::test]
async fn task_reloads_the_files() {
    let files = Files::new();
    let credentials = Arc::new(files.credentials());
    let tasks = Tasks::default();
    credentials.start(&tasks);
    std::fs::write(files.tokens(), "").unwrap();
    gauntlet_testing::eventually("the token is refused", async || (!accepts(&credentials, 1)).then_some(())).await;
    assert_eq!(tasks.drain(std::time::Duration::from_secs(10)).await, 0);
}

#[test]
fn unusable_file_is_refused_at_start_with_its_name_and_line() {
    let files = Files::new();
    std::fs::write(files.tokens(), "\n{}").unwrap();
    let error = format!("{:#}", Credentials::load(&files.config()).map(drop).unwrap_err());
    assert!(error.starts_with("cannot use --tokens ") && error.contains("tokens: line 2: "), "{error}");
    let mut config = files.config();
    config.tokens = Some(Path::new("/nonexistent").to_owned());
    let error = format!("{:#}", Credentials::load(&config).map(drop).unwrap_err());
    assert!(error.starts_with("cannot use --tokens /nonexistent: "), "{error}");
}
