//! `gauntlet token`: edits the file that the manager reads with `--tokens`. Talks to no manager.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use gauntlet_access::{Name, Scope, Token, TokenFile, TokenId, TokenRecord, append_record, remove_record};
use jiff::{SignedDuration, Timestamp};
use rand::TryRng as _;
use secrecy::ExposeSecret as _;

use super::{
    arguments::{lifetime, path},
    failure::Failure,
    output::{Format, table, write},
    printable::printable,
    token_file,
};

pub(super) const EXAMPLES: &str = "\
The manager reads the file with --tokens and notices changes within seconds. The file has no secrets: a token is shown once, when it is created.

Examples:
  gauntlet token create --tokens tokens.jsonl --name ctfd --scope operate
  gauntlet token create --tokens tokens.jsonl --name author --scope admin --challenge web-1 --expires-in 30d
  gauntlet token list --tokens tokens.jsonl
  gauntlet token revoke --tokens tokens.jsonl 8c1f0a9be312";

/// The file to edit.
#[derive(Debug, Args)]
pub(crate) struct File {
    /// The token file.
    #[arg(long, env = "TOKENS", global = true, value_parser = path, value_name = "FILE")]
    tokens: Option<PathBuf>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a token, and print it: the only time that it is shown. Makes the file if there is none.
    Create {
        /// Who will hold it, as it appears in the audit log.
        #[arg(long, value_name = "NAME")]
        name: Name,
        /// What its holder may do: read; operate (instances too); admin (challenges too).
        #[arg(long, value_name = "SCOPE")]
        scope: Scope,
        /// A challenge that its holder sees and changes; repeat for more [default: all].
        #[arg(long = "challenge", value_name = "ID")]
        challenges: Vec<Name>,
        /// How long it is valid, such as 30d or 12h [default: until it is revoked].
        #[arg(long, value_parser = lifetime, value_name = "DURATION")]
        expires_in: Option<SignedDuration>,
    },
    /// List the tokens, without their secrets.
    List {
        /// A table, or JSON with one object per line.
        #[arg(long, short, default_value = "table", value_name = "FORMAT")]
        output: Format,
    },
    /// Revoke tokens: the manager refuses them within seconds.
    Revoke {
        /// The ids, as `gauntlet token list` shows them.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<TokenId>,
    },
}

pub(super) fn run(File { tokens: path }: &File, command: Command) -> Result<(), Failure> {
    let Some(path) = path.as_deref().filter(|path| !path.as_os_str().is_empty()) else {
        return Err(Failure::Usage("no token file; pass --tokens FILE or set TOKENS"));
    };
    match command {
        Command::Create { name, scope, challenges, expires_in } => {
            let token = generate()?;
            let now = Timestamp::now();
            let too_late = |_| Failure::Usage("--expires-in reaches beyond the year 9999; pass a shorter one");
            let expires = expires_in.map(|lifetime| now.checked_add(lifetime)).transpose().map_err(too_late)?;
            // Seconds are enough for people.
            let seconds = |at: Timestamp| Timestamp::from_second(at.as_second()).unwrap_or(at);
            let mut record = TokenRecord::new(&token, name, scope, seconds(now));
            record.challenges = (!challenges.is_empty()).then(|| challenges.into_iter().collect());
            record.expires = expires.map(seconds);
            token_file::edit(path, |text| {
                parse(path, text)?;
                append_record(text, &record).map_err(|error| Failure::TokenFile(error.to_string()))
            })?;
            write(token.reveal().expose_secret())
        }
        Command::List { output } => {
            let text = token_file::read(path)?;
            let file = parse(path, &text)?;
            write(&list(file.records(), output, Timestamp::now())?)
        }
        Command::Revoke { ids } => {
            token_file::edit(path, |text| {
                let mut text = text.to_owned();
                for id in &ids {
                    text = remove_record(&text, *id).ok_or_else(|| {
                        Failure::TokenFile(format!(
                            "{} has no token {id}; `gauntlet token list` shows the ids. Nothing was revoked",
                            path.display()
                        ))
                    })?;
                }
                Ok(text)
            })?;
            write(&format!("Revoked {}.", ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")))
        }
    }
}

/// Makes a token of random bytes from the operating system.
fn generate() -> Result<Token, Failure> {
    let mut random = [0; Token::RANDOM_BYTES];
    rand::rngs::SysRng.try_fill_bytes(&mut random).map_err(|error| Failure::Io(std::io::Error::other(error)))?;
    Ok(Token::generate(&random))
}

fn parse(path: &Path, text: &str) -> Result<TokenFile, Failure> {
    TokenFile::parse(text).map_err(|error| Failure::TokenFile(format!("{}, {error}", path.display())))
}

fn list(records: &[TokenRecord], output: Format, now: Timestamp) -> Result<String, Failure> {
    if output == Format::Json {
        let line = |record: &TokenRecord| {
            let mut fields = serde_json::to_value(record)?;
            // Of no use to a reader of the list.
            fields.as_object_mut().map(|fields| fields.remove("sha256"));
            serde_json::to_string(&fields)
        };
        let lines: Result<Vec<_>, _> = records.iter().map(line).collect();
        return lines.map(|lines| lines.join("\n")).map_err(|error| Failure::Json(error.to_string()));
    }
    if records.is_empty() {
        return Ok("No tokens.".into());
    }
    let rows = records.iter().map(|record| {
        let challenges = record.challenges.as_ref().map_or_else(
            || "all".to_owned(),
            |ids| ids.iter().map(|id| printable(id.as_str())).collect::<Vec<_>>().join(", "),
        );
        let expires = record.expires.map_or_else(
            || "never".to_owned(),
            |at| if at <= now { format!("{at} (expired)") } else { at.to_string() },
        );
        vec![
            record.id.to_string(),
            printable(record.name.as_str()),
            record.scope.to_string(),
            challenges,
            record.created.to_string(),
            expires,
        ]
    });
    Ok(table(&["ID", "NAME", "SCOPE", "CHALLENGES", "CREATED", "EXPIRES"], rows))
}
