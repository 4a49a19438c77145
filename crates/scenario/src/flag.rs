//! Varies flags per identity, with a secret key.

use std::{fmt, fs, io, os::unix::fs::OpenOptionsExt as _, path::Path, sync::Arc};

use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::{TryRng as _, rngs::SysRng};
use secrecy::{ExposeSecret as _, SecretBox, zeroize::Zeroizing};
use sha2::Sha256;

/// The minimum entropy of a varied text, in bits.
pub const MIN_ENTROPY_BITS: u32 = 64;
/// The length limit of a text to vary, in bytes.
pub const MAX_TEXT_BYTES: usize = 1024;

/// The operator's secret key, from which varied flags are derived. Managers that share a store must share the key. `Debug` hides it.
#[derive(Clone)]
pub struct FlagKey(Arc<SecretBox<[u8; 32]>>);

impl FlagKey {
    /// Creates a key from 32 random bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Arc::new(SecretBox::init_with(|| bytes)))
    }

    /// Parses 64 hexadecimal characters, with optional surrounding white space.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut decoded = Ok(());
        let key = SecretBox::init_with_mut(|bytes: &mut [u8; 32]| decoded = hex::decode_to_slice(text.trim(), bytes));
        decoded.ok().map(|()| Self(Arc::new(key)))
    }

    /// Creates a random key.
    ///
    /// # Errors
    /// The system has no randomness.
    pub(crate) fn random() -> io::Result<Self> {
        let mut filled = Ok(());
        let key = SecretBox::init_with_mut(|bytes: &mut [u8; 32]| filled = SysRng.try_fill_bytes(bytes));
        filled.map_err(io::Error::other)?;
        Ok(Self(Arc::new(key)))
    }

    /// Names the key without revealing anything about it: 8 hexadecimal characters.
    pub fn id(&self) -> String {
        let [a, b, c, d, ..] = hmac(self.0.expose_secret(), &[b"gauntlet flag key id"]);
        hex::encode([a, b, c, d])
    }

    pub(crate) fn to_hex(&self) -> Zeroizing<String> {
        Zeroizing::new(hex::encode(self.0.expose_secret()))
    }

    /// Creates a file with a random key, readable by its owner only, unless there is one. Processes that do this concurrently leave one file.
    pub(crate) fn create(path: &Path) -> io::Result<()> {
        let key = Self::random()?;
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        // Written to a temporary file and linked into place, so that nobody reads half a key.
        let draft = tempfile::Builder::new()
            .prefix(".key-")
            .make_in(dir, |draft| fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(draft))?;
        let text = Zeroizing::new(format!("{}\n", *key.to_hex()));
        io::Write::write_all(&mut draft.as_file(), text.as_bytes())?;
        draft.as_file().sync_all()?;
        match draft.persist_noclobber(path) {
            Err(error) if error.error.kind() != io::ErrorKind::AlreadyExists => Err(error.error),
            _ => Ok(()),
        }
    }

    /// Varies a text for one identity and one flag: letters change case or become similar digits, and base32 characters are appended if the
    /// letters carry less than [`MIN_ENTROPY_BITS`]. The result depends on key, identity, flag and text only. Without the key, known results
    /// reveal nothing about others.
    pub(crate) fn vary(&self, identity: &str, flag: &str, text: &str) -> String {
        let mut stream =
            Stream::new(self.0.expose_secret(), &[identity.as_bytes(), &[0], flag.as_bytes(), &[0], text.as_bytes()]);
        let mut varied = String::with_capacity(text.len() + 16);
        // Counted in half bits, rounded down: two choices carry two half bits, three choices three.
        let mut entropy = 0u32;
        for c in text.chars() {
            let choices = Choices::of(c);
            entropy = entropy.saturating_add(choices.half_bits());
            varied.push(choices.pick(&mut stream));
        }
        let missing = (2 * MIN_ENTROPY_BITS).saturating_sub(entropy).div_ceil(2);
        if missing > 0 {
            if !text.is_empty() {
                varied.push('_');
            }
            for _ in 0..missing.div_ceil(5) {
                let at = stream.next() % 32;
                varied.extend(TAIL.get(at as usize).map(|b| char::from(*b)));
            }
        }
        varied
    }
}

impl fmt::Debug for FlagKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FlagKey(hidden)")
    }
}

const TAIL: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// What a character may become: only itself, either case, or either case or a digit.
struct Choices {
    as_is: char,
    letter: bool,
    digit: Option<char>,
}

impl Choices {
    fn of(c: char) -> Self {
        let digit = match c.to_ascii_lowercase() {
            'a' => Some('4'),
            'b' => Some('8'),
            'e' => Some('3'),
            'g' => Some('9'),
            'i' => Some('1'),
            'l' => Some('7'),
            'o' => Some('0'),
            's' => Some('5'),
            'z' => Some('2'),
            _ => None,
        };
        Self { as_is: c, letter: c.is_ascii_alphabetic(), digit }
    }

    /// log2(3) is over 1.58. The bias of a 32-bit draw modulo 3 costs less than a billionth of a bit.
    fn half_bits(&self) -> u32 {
        match (self.letter, self.digit) {
            (false, _) => 0,
            (true, None) => 2,
            (true, Some(_)) => 3,
        }
    }

    fn pick(&self, stream: &mut Stream) -> char {
        if !self.letter {
            return self.as_is;
        }
        match (stream.next() % if self.digit.is_some() { 3 } else { 2 }, self.digit) {
            (2, Some(digit)) => digit,
            (1, _) => self.as_is.to_ascii_uppercase(),
            _ => self.as_is.to_ascii_lowercase(),
        }
    }
}

/// A stream of 32-bit words: HMAC-SHA256 in counter mode, keyed with the HMAC of the message.
struct Stream {
    seed: [u8; 32],
    counter: u32,
    block: std::array::IntoIter<u8, 32>,
}

impl Stream {
    fn new(key: &[u8; 32], message: &[&[u8]]) -> Self {
        Self { seed: hmac(key, message), counter: 0, block: [0; 32].into_iter() }.emptied()
    }

    fn emptied(mut self) -> Self {
        self.block.by_ref().for_each(drop);
        self
    }

    fn next(&mut self) -> u32 {
        let mut word = 0u32;
        for _ in 0..4 {
            let byte = self.block.next().unwrap_or_else(|| {
                self.block = hmac(&self.seed, &[&self.counter.to_be_bytes()]).into_iter();
                self.counter += 1;
                self.block.next().unwrap_or_default()
            });
            word = word << 8 | u32::from(byte);
        }
        word
    }
}

fn hmac(key: &[u8; 32], message: &[&[u8]]) -> [u8; 32] {
    // HMAC pads keys to the hash's block size with zeros.
    let mut block = [0; 64];
    block.iter_mut().zip(key).for_each(|(to, from)| *to = *from);
    let mut mac = Hmac::<Sha256>::new(&block.into());
    message.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]
    use std::{collections::BTreeSet, os::unix::fs::PermissionsExt as _, sync::LazyLock};

    use proptest::prelude::*;

    use super::*;

    static KEY: LazyLock<FlagKey> = LazyLock::new(|| FlagKey::new([7; 32]));

    #[test]
    fn variation_never_changes() {
        insta::assert_snapshot!(KEY.vary("0123456789abcdef", "main", "hello web"), @"hel7o w3b_efml6eaho3r");
        insta::assert_snapshot!(KEY.vary("0123456789abcdef", "main", ""), @"4flkfsngu2fgr");
        let long = "the quick brown fox jumps over the lazy dog and some more words still";
        insta::assert_snapshot!(KEY.vary("0123456789abcdef", "main", long), @"tHe QuicK BR0wn FOX jUMPs oV3R the 7azY DOg and 50ME MOrE w0RdS ST1l7");
    }

    #[test]
    fn every_input_changes_the_result() {
        let all = [
            KEY.vary("0000000000000000", "main", "text"),
            KEY.vary("0000000000000001", "main", "text"),
            KEY.vary("0000000000000000", "other", "text"),
            KEY.vary("0000000000000000", "main", "texts"),
            FlagKey::new([8; 32]).vary("0000000000000000", "main", "text"),
        ];
        assert_eq!(BTreeSet::from(all.clone()).len(), all.len());
    }

    #[test]
    fn concurrent_creation_yields_one_private_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/flag.key");
        std::thread::scope(|scope| {
            let creating: Vec<_> = (0..8).map(|_| scope.spawn(|| FlagKey::create(&path).unwrap())).collect();
            creating.into_iter().for_each(|thread| thread.join().unwrap());
        });
        let key = FlagKey::from_hex(&fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no draft is left");
        assert_eq!(format!("{key:?}"), "FlagKey(hidden)");
    }

    /// The entropy of a varied text as documented, in half bits.
    fn documented_half_bits(text: &str, varied: &str) -> u32 {
        let tail = varied.chars().count() - text.chars().count();
        let letters: u32 = text.chars().map(|c| Choices::of(c).half_bits()).sum();
        letters + 10 * (tail.saturating_sub(usize::from(!text.is_empty())) as u32)
    }

    proptest! {
        #[test]
        fn varied_text_stays_readable_and_has_enough_entropy(bits: u64, text in "\\PC{0,90}") {
            let identity = format!("{bits:016x}");
            let varied = KEY.vary(&identity, "main", &text);
            prop_assert_eq!(&varied, &KEY.vary(&identity, "main", &text));
            prop_assert!(documented_half_bits(&text, &varied) >= 2 * MIN_ENTROPY_BITS);
            for (from, to) in text.chars().zip(varied.chars()) {
                let choices = Choices::of(from);
                prop_assert!(from.eq_ignore_ascii_case(&to) || choices.digit == Some(to));
            }
        }

        #[test]
        fn hex_round_trips(bytes: [u8; 32]) {
            let hex = hex::encode_upper(bytes);
            prop_assert_eq!(*FlagKey::from_hex(&format!(" {hex}\n")).unwrap().0.expose_secret(), bytes);
        }

        #[test]
        fn hex_never_panics(text in "\\PC{0,80}") { let _ = FlagKey::from_hex(&text); }
    }
}
