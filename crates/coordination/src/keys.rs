//! The key schema: which key each record, index entry and lock is stored under.
//!
//! A key is the prefix followed by words that are separated by spaces. IDs may contain any text without control characters, so within a word
//! a space is escaped as `!0` and `!` as `!1`. The space sorts before every character that a word can contain. Keys therefore sort like the
//! lists of their words, and the keys below `a` never mix with those below `a-b`.
//!
//! ```text
//! challenges <c>                     the record of a challenge
//! instances <c> s <source>           the record of a claimed instance
//! instances <c> p <identity>         the record of a pooled instance
//! instances <c> s <source> intent    the operation in progress, until it is committed to the record
//! by-source <source> <c>             index: claimed instances
//! by-expiry <until> <c> s <source>   index: claimed instances with an expiry
//! working <c> s <source>             index: instances that aren't ready; the value is the phase, or the time of the next attempt after a failure
//! rollouts <c>                       index: challenges with an update or deletion in progress
//! pools <c> [<identity>]             index: challenges with a pool, and pooled instances; the challenge's key is put again whenever an
//!                                    instance that counts toward the pool's bounds is added
//! store                              the store's ID: random, set on first use
//! live owners <c> s <source>         the owner of the instance; attached to its replica's lease
//! live locks <kind> <c> w <unique>   a holder or waiter of a lock, ordered by create revision; attached to its replica's lease
//! ```

use gauntlet_domain::{
    Assignment, Challenge, ChallengeId, Identity, Instance, InstanceKey, LockKind, Phase, PhaseName, SourceId,
};
use jiff::Timestamp;

use crate::kv::KeyRange;

const SPACE: char = ' ';
/// A fixed word in each lock's key. Earlier builds had other lock modes; keeping the word lets builds of both kinds see each other's locks.
const EXCLUSIVE: &str = "w";

/// Builds and parses the keys below one prefix.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    prefix: String,
}

impl Layout {
    pub(crate) fn new(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into() }
    }

    fn key(&self, words: &[&str]) -> String {
        let mut key = self.prefix.clone();
        for (i, word) in words.iter().enumerate() {
            if i > 0 {
                key.push(SPACE);
            }
            escape(word, &mut key);
        }
        key
    }

    /// The keys that continue `words`; the key of `words` itself is not included.
    fn below(&self, words: &[&str]) -> KeyRange {
        let key = self.key(words);
        KeyRange::between(format!("{key} "), format!("{key}!"))
    }

    /// Splits a key into its words; `None` if it has another prefix or an invalid escape.
    fn words(&self, key: &str) -> Option<Vec<String>> {
        key.strip_prefix(&self.prefix)?.split(SPACE).map(unescape).collect()
    }

    pub(crate) fn store(&self) -> String {
        self.key(&["store"])
    }

    pub(crate) fn challenge(&self, id: &ChallengeId) -> String {
        self.key(&["challenges", id.as_str()])
    }

    pub(crate) fn challenges(&self) -> KeyRange {
        self.below(&["challenges"])
    }

    pub(crate) fn parse_challenge(&self, key: &str) -> Option<ChallengeId> {
        match self.words(key)?.as_slice() {
            [_, id] => ChallengeId::new(id.as_str()).ok(),
            _ => None,
        }
    }

    pub(crate) fn instance(&self, key: &InstanceKey) -> String {
        let (kind, name) = assignment(&key.assignment);
        self.key(&["instances", key.challenge.as_str(), kind, name])
    }

    pub(crate) fn intent(&self, key: &InstanceKey) -> String {
        let (kind, name) = assignment(&key.assignment);
        self.key(&["instances", key.challenge.as_str(), kind, name, "intent"])
    }

    /// The record of an instance and its intent.
    pub(crate) fn record_and_intent(&self, key: &InstanceKey) -> KeyRange {
        let key = self.instance(key);
        KeyRange::between(key.clone(), format!("{key}!"))
    }

    pub(crate) fn instances(&self) -> KeyRange {
        self.below(&["instances"])
    }

    pub(crate) fn instances_of(&self, id: &ChallengeId) -> KeyRange {
        self.below(&["instances", id.as_str()])
    }

    pub(crate) fn pooled_of(&self, id: &ChallengeId) -> KeyRange {
        self.below(&["instances", id.as_str(), "p"])
    }

    /// The claimed instances of a challenge, and their intents.
    pub(crate) fn claimed_of(&self, id: &ChallengeId) -> KeyRange {
        self.below(&["instances", id.as_str(), "s"])
    }

    /// Parses the key of a record or an intent; also returns whether it is an intent.
    pub(crate) fn parse_instance(&self, key: &str) -> Option<(InstanceKey, bool)> {
        match self.words(key)?.as_slice() {
            [what, c, kind, name] if what == "instances" => Some((parse_instance_key(c, kind, name)?, false)),
            [what, c, kind, name, intent] if what == "instances" && intent == "intent" => {
                Some((parse_instance_key(c, kind, name)?, true))
            }
            _ => None,
        }
    }

    pub(crate) fn by_source(&self, source: &SourceId) -> KeyRange {
        self.below(&["by-source", source.as_str()])
    }

    pub(crate) fn parse_by_source(&self, key: &str) -> Option<InstanceKey> {
        match self.words(key)?.as_slice() {
            [_, source, c] => parse_instance_key(c, "s", source),
            _ => None,
        }
    }

    /// The index of the claimed instances that expire at `now` or earlier.
    pub(crate) fn expired(&self, now: Timestamp) -> KeyRange {
        KeyRange::between(
            format!("{} ", self.key(&["by-expiry"])),
            format!("{}!", self.key(&["by-expiry", &sortable(now)])),
        )
    }

    pub(crate) fn working(&self, key: &InstanceKey) -> String {
        let (kind, name) = assignment(&key.assignment);
        self.key(&["working", key.challenge.as_str(), kind, name])
    }

    /// The pooled instances of a challenge that are not ready.
    pub(crate) fn pool_working(&self, id: &ChallengeId) -> KeyRange {
        self.below(&["working", id.as_str(), "p"])
    }

    /// Parses a value of the `working` index.
    pub(crate) fn parse_working(value: &[u8]) -> PhaseName {
        let working = [PhaseName::Provisioning, PhaseName::Updating, PhaseName::Deleting];
        let named = working.into_iter().find(|phase| phase.name().as_bytes() == value);
        // Earlier builds wrote an empty value for every phase that isn't ready.
        named.unwrap_or(if value.is_empty() { PhaseName::Updating } else { PhaseName::Failed })
    }

    pub(crate) fn all_working(&self) -> KeyRange {
        self.below(&["working"])
    }

    pub(crate) fn owner(&self, key: &InstanceKey) -> String {
        let (kind, name) = assignment(&key.assignment);
        self.key(&["live", "owners", key.challenge.as_str(), kind, name])
    }

    /// Parses a key of `working`, `by-expiry` or `live owners`.
    pub(crate) fn parse_instance_key(&self, key: &str) -> Option<InstanceKey> {
        match self.words(key)?.as_slice() {
            [.., c, kind, name] => parse_instance_key(c, kind, name),
            _ => None,
        }
    }

    pub(crate) fn rollouts(&self) -> KeyRange {
        self.below(&["rollouts"])
    }

    pub(crate) fn pools(&self) -> KeyRange {
        self.below(&["pools"])
    }

    /// The key of a challenge with a pool; its mod revision is the pool's version.
    pub(crate) fn pool(&self, id: &ChallengeId) -> String {
        self.key(&["pools", id.as_str()])
    }

    /// The index of a challenge's pooled instances.
    pub(crate) fn pool_index(&self, id: &ChallengeId) -> KeyRange {
        self.below(&["pools", id.as_str()])
    }

    /// Parses a key of [`Layout::pool_index`].
    pub(crate) fn parse_pooled(&self, key: &str) -> Option<InstanceKey> {
        match self.words(key)?.as_slice() {
            [_, c, identity] => parse_instance_key(c, "p", identity),
            _ => None,
        }
    }

    /// Parses the challenge in a key of `rollouts` or `pools`.
    pub(crate) fn parse_index(&self, key: &str) -> Option<ChallengeId> {
        match self.words(key)?.as_slice() {
            [_, c, ..] => ChallengeId::new(c.as_str()).ok(),
            _ => None,
        }
    }

    pub(crate) fn lock(&self, kind: LockKind, id: &ChallengeId, unique: &str) -> String {
        self.key(&["live", "locks", kind.name(), id.as_str(), EXCLUSIVE, unique])
    }

    /// The holders and waiters of a lock.
    pub(crate) fn queue(&self, kind: LockKind, id: &ChallengeId) -> KeyRange {
        self.below(&["live", "locks", kind.name(), id.as_str(), EXCLUSIVE])
    }

    /// Every key attached to a lease.
    pub(crate) fn live(&self) -> KeyRange {
        self.below(&["live"])
    }

    #[cfg(test)]
    pub(crate) fn all_keys(&self) -> KeyRange {
        KeyRange::between(self.prefix.clone(), format!("{}\u{10FFFF}", self.prefix))
    }

    /// The index entries of an instance: keys and values. They depend on the record only.
    pub(crate) fn instance_index(&self, instance: &Instance) -> Vec<(String, String)> {
        let c = instance.key.challenge.as_str();
        let mut index = Vec::new();
        match &instance.key.assignment {
            Assignment::Source(source) => {
                index.push((self.key(&["by-source", source.as_str(), c]), String::new()));
                if let Some(until) = instance.until {
                    index.push((self.key(&["by-expiry", &sortable(until), c, "s", source.as_str()]), String::new()));
                }
            }
            Assignment::Pool(identity) => index.push((self.key(&["pools", c, identity.as_str()]), String::new())),
        }
        match &instance.phase {
            Phase::Ready => {}
            Phase::Failed(failure) => index.push((self.working(&instance.key), failure.retry_at.to_string())),
            working => index.push((self.working(&instance.key), PhaseName::from(working).name().to_owned())),
        }
        index
    }

    /// Every index key that a challenge can have, and whether this one has it.
    pub(crate) fn challenge_index(&self, challenge: &Challenge) -> [(String, bool); 2] {
        let c = challenge.id.as_str();
        [
            (self.key(&["rollouts", c]), challenge.rollout.is_some() || challenge.deleting),
            (self.key(&["pools", c]), challenge.bounds.min() > 0),
        ]
    }

    /// Every index key that a challenge can have, to delete with it.
    pub(crate) fn all_challenge_index(&self, id: &ChallengeId) -> [String; 2] {
        [self.key(&["rollouts", id.as_str()]), self.key(&["pools", id.as_str()])]
    }
}

fn assignment(assignment: &Assignment) -> (&'static str, &str) {
    match assignment {
        Assignment::Source(source) => ("s", source.as_str()),
        Assignment::Pool(identity) => ("p", identity.as_str()),
    }
}

fn parse_instance_key(c: &str, kind: &str, name: &str) -> Option<InstanceKey> {
    let assignment = match kind {
        "s" => Assignment::Source(SourceId::new(name).ok()?),
        "p" => Assignment::Pool(Identity::parse(name).ok()?),
        _ => return None,
    };
    Some(InstanceKey { challenge: ChallengeId::new(c).ok()?, assignment })
}

/// Formats a time so that texts sort like times. Times before year 0 sort as year 0.
fn sortable(time: Timestamp) -> String {
    if time.to_string().starts_with('-') { "0000-01-01T00:00:00.000000000Z".to_owned() } else { format!("{time:.9}") }
}

fn escape(word: &str, key: &mut String) {
    for c in word.chars() {
        match c {
            ' ' => key.push_str("!0"),
            '!' => key.push_str("!1"),
            c => key.push(c),
        }
    }
}

fn unescape(word: &str) -> Option<String> {
    let mut text = String::with_capacity(word.len());
    let mut chars = word.chars();
    while let Some(c) = chars.next() {
        match c {
            '!' => text.push(match chars.next()? {
                '0' => ' ',
                '1' => '!',
                _ => return None,
            }),
            c => text.push(c),
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    fn key(c: &str, s: &str) -> InstanceKey {
        InstanceKey {
            challenge: ChallengeId::new(c).unwrap(),
            assignment: Assignment::Source(SourceId::new(s).unwrap()),
        }
    }

    #[test]
    fn keys_are_readable() {
        let layout = Layout::new("gauntlet/");
        assert_eq!(layout.instance(&key("web 1", "team/7!")), "gauntlet/instances web!01 s team/7!1");
        assert_eq!(layout.intent(&key("a", "b")), "gauntlet/instances a s b intent");
        assert_eq!(
            layout.lock(LockKind::Rollout, &ChallengeId::new("a").unwrap(), "7-1"),
            "gauntlet/live locks rollout a w 7-1"
        );
    }

    fn id() -> impl Strategy<Value = String> {
        prop_oneof!["[ !\"#ab]{1,4}", "\\PC{1,12}"].prop_filter("an id", |text| ChallengeId::new(text.as_str()).is_ok())
    }

    fn within(range: &KeyRange, key: &str) -> bool {
        range.end.is_some() && range.contains(key)
    }

    proptest! {
        #[test]
        fn instance_keys_round_trip(c in id(), s in id()) {
            let layout = Layout::new("gauntlet/");
            let key = key(&c, &s);
            prop_assert_eq!(layout.parse_instance(&layout.instance(&key)), Some((key.clone(), false)));
            prop_assert_eq!(layout.parse_instance(&layout.intent(&key)), Some((key.clone(), true)));
            prop_assert_eq!(layout.parse_instance_key(&layout.owner(&key)), Some(key.clone()));
            prop_assert_eq!(layout.parse_instance_key(&layout.working(&key)), Some(key.clone()));
            prop_assert_eq!(layout.parse_challenge(&layout.challenge(&key.challenge)), Some(key.challenge));
        }

        #[test]
        fn keys_sort_like_ids(a in (id(), id()), b in (id(), id())) {
            let layout = Layout::new("gauntlet/");
            let (ka, kb) = (layout.instance(&key(&a.0, &a.1)), layout.instance(&key(&b.0, &b.1)));
            prop_assert_eq!(a.cmp(&b), ka.cmp(&kb));
        }

        #[test]
        fn ranges_contain_only_their_own_keys(a in (id(), id()), b in (id(), id())) {
            let layout = Layout::new("gauntlet/");
            let (sa, sb) = (key(&a.0, &a.1), key(&b.0, &b.1));
            prop_assert_eq!(within(&layout.instances_of(&sa.challenge), &layout.instance(&sb)), a.0 == b.0);
            prop_assert_eq!(within(&layout.instances_of(&sa.challenge), &layout.intent(&sb)), a.0 == b.0);
            prop_assert_eq!(within(&layout.record_and_intent(&sa), &layout.instance(&sb)), a == b);
            prop_assert_eq!(within(&layout.record_and_intent(&sa), &layout.intent(&sb)), a == b);
            let lock = layout.lock(LockKind::Challenge, &sb.challenge, "1");
            prop_assert_eq!(within(&layout.queue(LockKind::Challenge, &sa.challenge), &lock), a.0 == b.0);
            prop_assert!(within(&layout.live(), &lock) && within(&layout.live(), &layout.owner(&sb)));
        }

        #[test]
        fn intent_sorts_right_after_its_record(a in (id(), id()), b in (id(), id())) {
            let layout = Layout::new("gauntlet/");
            let (sa, sb) = (key(&a.0, &a.1), key(&b.0, &b.1));
            let (record, intent, other) = (layout.instance(&sa), layout.intent(&sa), layout.instance(&sb));
            prop_assert!(a == b || other < record || other > intent);
        }

        #[test]
        fn expiries_sort_like_times(a in -62_167_219_200i64..253_402_207_200, b in -62_167_219_200i64..253_402_207_200, n in 0i32..1_000_000_000) {
            let (a, b) = (Timestamp::new(a, 0).unwrap(), Timestamp::new(b, 0).unwrap());
            prop_assert_eq!(sortable(a).cmp(&sortable(b)), a.cmp(&b));
            if let Ok(later) = Timestamp::new(a.as_second(), n) { prop_assert_eq!(sortable(a).cmp(&sortable(later)), a.cmp(&later)); }
        }
    }
}
