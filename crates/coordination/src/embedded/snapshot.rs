//! The store at one revision, and how to read it: the table in the file merged with the leased keys in memory.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use redb::{ReadOnlyTable, ReadableTable, TableDefinition};

use crate::kv::{Compare, Get, KeyRange, KeyValue, LeaseId};

/// Create revision, mod revision, value.
pub(super) type Entry = (u64, u64, &'static [u8]);
pub(super) const ENTRIES: TableDefinition<'static, &'static str, Entry> = TableDefinition::new("entries");
pub(super) const META: TableDefinition<'static, &'static str, u64> = TableDefinition::new("meta");
/// The key in [`META`] that counts process starts.
pub(super) const EPOCH: &str = "epoch";

/// The whole store after one commit.
pub struct Snapshot {
    pub(super) table: Arc<ReadOnlyTable<&'static str, Entry>>,
    pub(super) leased: Arc<LeasedEntries>,
    pub(super) revision: u64,
}

/// The keys attached to a lease. A key is either here or in the table, never in both.
pub(super) type LeasedEntries = BTreeMap<String, LeasedEntry>;

#[derive(Debug, Clone)]
pub(super) struct LeasedEntry {
    pub(super) create_revision: u64,
    pub(super) mod_revision: u64,
    pub(super) value: Vec<u8>,
    pub(super) lease: LeaseId,
}

/// An entry from either place.
struct EntryRef<'a> {
    key: &'a str,
    create_revision: u64,
    mod_revision: u64,
    value: &'a [u8],
}

/// Visits the entries of a range in key order until `visitor` returns false.
fn visit(
    range: &KeyRange,
    table: &impl ReadableTable<&'static str, Entry>,
    leased: &LeasedEntries,
    mut visitor: impl FnMut(EntryRef<'_>) -> bool,
) -> Result<(), redb::Error> {
    let start = range.start.as_str();
    let bounds = (Bound::Included(start), range.end.as_deref().map_or(Bound::Included(start), Bound::Excluded));
    // The iterators panic if the end is before the start.
    if range.end.as_deref().is_some_and(|end| end <= start) {
        return Ok(());
    }
    let mut stored_entries = table.range::<&str>(bounds)?;
    let mut leased_entries = leased.range::<str, _>(bounds).peekable();
    let mut next_stored = stored_entries.next().transpose()?;
    loop {
        let leased_first = match (&next_stored, leased_entries.peek()) {
            (Some((stored, _)), Some((leased, _))) => leased.as_str() < stored.value(),
            (None, Some(_)) => true,
            (Some(_), None) => false,
            (None, None) => return Ok(()),
        };
        if leased_first {
            if let Some((key, entry)) = leased_entries.next() {
                let (create_revision, mod_revision) = (entry.create_revision, entry.mod_revision);
                if !visitor(EntryRef { key, create_revision, mod_revision, value: &entry.value }) {
                    return Ok(());
                }
            }
        } else if let Some((key, entry)) = next_stored.take() {
            let (create_revision, mod_revision, value) = entry.value();
            if !visitor(EntryRef { key: key.value(), create_revision, mod_revision, value }) {
                return Ok(());
            }
            next_stored = stored_entries.next().transpose()?;
        }
    }
}

/// Reads a range; returns its keys and whether there are more than the limit allows.
pub(super) fn read_range(
    get: &Get,
    table: &impl ReadableTable<&'static str, Entry>,
    leased: &LeasedEntries,
) -> Result<(Vec<KeyValue>, bool), redb::Error> {
    let (mut kvs, mut more) = (Vec::new(), false);
    visit(&get.range, table, leased, |entry| {
        more = get.limit > 0 && kvs.len() == get.limit;
        if !more {
            let EntryRef { key, create_revision, mod_revision, value } = entry;
            let value = if get.keys_only { Vec::new() } else { value.to_vec() };
            kvs.push(KeyValue { key: key.to_owned(), value, create_revision, mod_revision });
        }
        !more
    })?;
    Ok((kvs, more))
}

/// Counts the keys of a range.
pub(super) fn count(
    range: &KeyRange,
    table: &impl ReadableTable<&'static str, Entry>,
    leased: &LeasedEntries,
) -> Result<u64, redb::Error> {
    let mut count = 0;
    visit(range, table, leased, |_| {
        count += 1;
        true
    })?;
    Ok(count)
}

/// Reads the `limit` keys of a range with the lowest create revisions, in that order, and counts the range.
pub(super) fn oldest(
    range: &KeyRange,
    limit: usize,
    table: &impl ReadableTable<&'static str, Entry>,
    leased: &LeasedEntries,
) -> Result<(Vec<KeyValue>, usize), redb::Error> {
    let (mut first, mut count) = (BTreeMap::new(), 0);
    visit(range, table, leased, |entry| {
        count += 1;
        let EntryRef { key, create_revision, mod_revision, value } = entry;
        let (key, value) = (key.to_owned(), value.to_vec());
        first.insert((create_revision, key.clone()), KeyValue { key, value, create_revision, mod_revision });
        if first.len() > limit {
            first.pop_last();
        }
        true
    })?;
    Ok((first.into_values().collect(), count))
}

/// Whether every compare holds.
pub(super) fn compares_hold(
    compares: &[Compare],
    table: &impl ReadableTable<&'static str, Entry>,
    leased: &LeasedEntries,
) -> Result<bool, redb::Error> {
    for Compare { range, condition } in compares {
        let (mut any, mut all) = (false, true);
        visit(range, table, leased, |entry| {
            any = true;
            all = condition.holds_for(entry.create_revision, entry.mod_revision, entry.value);
            all
        })?;
        let holds = if any { all } else { condition.holds_if_absent() };
        if !holds {
            return Ok(false);
        }
    }
    Ok(true)
}
