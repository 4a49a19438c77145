//! Challenges, listings, counts and other reads.

use futures::StreamExt as _;

use super::*;

pub(super) async fn challenge_is_inserted_once(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let full = Challenge {
        timeout: Some(Duration::new(u64::MAX, 999_999_999)),
        until: Some(timestamp(1_000_000)),
        additional: BTreeMap::from([("a key / of \u{1F600}".to_owned(), "\"value\"\n".to_owned())]),
        bounds: PoolBounds::new(2, 5).unwrap(),
        rollout: Some(Rollout { strategy: Strategy::Recreate, traceparent: None }),
        deleting: true,
        traceparent: Some("00-aa-bb-01".to_owned()),
        ..challenge("web")
    };
    let results = futures::future::join_all((0..8).map(|_| store.insert_challenge(&full))).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    assert_eq!(results.iter().filter(|r| matches!(r, Err(Error::ChallengeExists(_)))).count(), 7);
    assert_eq!(store.stored_challenge("web").await.value, full);
    assert_eq!(store.challenge(&challenge_id("other")).await.unwrap(), None);
    store.ping().await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn challenge_is_updated_under_its_lock(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let read = store.add_challenge("web").await;
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    let changed = Challenge { bounds: PoolBounds::new(3, 0).unwrap(), deleting: true, ..read.value.clone() };
    guard.update_challenge(&changed).await.unwrap();
    let now = store.stored_challenge("web").await;
    assert_eq!(now.value, changed);
    assert!(now.version.0 > read.version.0);
    assert!(store.live_keys().await.is_empty(), "the update releases the lock");
    store.check_invariants().await;
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    guard.update_challenge(&read.value).await.unwrap();
    store.check_invariants().await;
    let guard = store.lock(LockKind::Challenge, &challenge_id("gone"), &long_timeout()).await.unwrap();
    let result = guard.update_challenge(&challenge("gone")).await;
    assert_eq!(result, Err(Error::ChallengeNotFound(challenge_id("gone"))));
    let guard = store.lock(LockKind::Challenge, &challenge_id("other"), &long_timeout()).await.unwrap();
    assert!(
        matches!(guard.update_challenge(&read.value).await, Err(Error::Internal(_))),
        "the lock of another challenge"
    );
    let guard = store.lock(LockKind::Rollout, &challenge_id("web"), &long_timeout()).await.unwrap();
    assert!(matches!(guard.update_challenge(&read.value).await, Err(Error::Internal(_))), "a lock of another kind");
    store.check_invariants().await;
}

pub(super) async fn challenge_with_instances_is_not_removed(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    let key = store.add_ready_instance(&web, source_key("web", "alice")).await.value.key;
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    assert_eq!(guard.remove_challenge().await, Err(Error::Conflict));
    eventually("the lock is released", || async { store.live_keys().await.is_empty() }).await;
    let (guard, _) = store.begin(&key, Intent::Delete, &long_timeout()).await.unwrap();
    guard.commit(Outcome::Remove).await.unwrap();
    // Instances of a challenge with a similar ID do not count.
    let other = store.add_challenge("web 2").await;
    store.add_ready_instance(&other, source_key("web 2", "alice")).await;
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    guard.remove_challenge().await.unwrap();
    assert_eq!(store.challenge(&challenge_id("web")).await.unwrap(), None);
    store.check_invariants().await;
    store.add_challenge("web").await;
}

pub(super) async fn snapshot_reads_challenge_instance_and_pool(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let empty = store.snapshot(&challenge_id("web"), &source_id("alice")).await.unwrap();
    assert!(empty.challenge.is_none() && empty.instance.is_none() && empty.pooled.is_empty());
    let web = store.add_challenge("web").await;
    let mine = store.add_ready_instance(&web, source_key("web", "alice")).await;
    store.add_ready_instance(&web, source_key("web", "bob")).await;
    let pool: Vec<Instance> =
        (0..40).map(|bits| Instance { until: None, ..instance(pool_key("web", bits), Phase::Ready) }).collect();
    store.put_instances(&pool).await;
    let (guard, _) = store.begin(&pool[3].key, Intent::Delete, &long_timeout()).await.unwrap();
    let snapshot = store.snapshot(&challenge_id("web"), &source_id("alice")).await.unwrap();
    assert_eq!(snapshot.challenge, Some(web));
    assert_eq!(snapshot.instance, Some(mine));
    assert_eq!(snapshot.pooled.len(), 16);
    assert!(snapshot.pooled.iter().all(|stored| stored.value.phase == Phase::Ready && stored.value.key != pool[3].key));
    guard.commit(Outcome::Remove).await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn snapshot_finds_ready_instances_behind_others(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    store.add_challenge("web").await;
    let phase = |bits| if bits == 90 { Phase::Ready } else { Phase::Provisioning };
    let pool: Vec<Instance> = (0..100).map(|bits| instance(pool_key("web", bits), phase(bits))).collect();
    store.put_instances(&pool).await;
    let snapshot = store.snapshot(&challenge_id("web"), &source_id("alice")).await.unwrap();
    assert_eq!(keys_of(&snapshot.pooled), BTreeSet::from([pool_key("web", 90)]));
}

fn many(challenge: &str, count: usize) -> Vec<Instance> {
    (0..count).map(|n| instance(source_key(challenge, &format!("team-{n:05}")), Phase::Ready)).collect()
}

pub(super) async fn instances_are_listed_over_many_pages(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    store.add_challenge("web").await;
    let all = many("web", 1300);
    store.put_instances(&all).await;
    // Some pages end between a record and its intent.
    let mut guards = Vec::new();
    for at in [254, 255, 256, 510] {
        guards.push(store.begin(&all[at].key, Intent::Delete, &long_timeout()).await.unwrap().0);
    }
    let listed: Vec<_> = store.instances_of(&challenge_id("web")).try_collect().await.unwrap();
    assert_eq!(listed.len(), 1300);
    assert_eq!(keys_of(&listed), all.iter().map(|instance| instance.key.clone()).collect());
    assert_eq!(listed.iter().filter(|stored| stored.value.phase == Phase::Deleting).count(), 4);
    let everyone: Vec<_> = store.instances_by_source(None).try_collect().await.unwrap();
    assert_eq!(everyone.len(), 1300);
    for guard in guards {
        guard.commit(Outcome::Remove).await.unwrap();
    }
    assert_eq!(store.census(timestamp(0)).await.unwrap().instances.values().sum::<u64>(), 1296);
    store.check_invariants().await;
}

pub(super) async fn challenges_are_listed_in_order_with_their_instances(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let names = ["a", "a b", "a!", "a-b", "b", "z", "\u{e9}", "\u{1F600}"];
    for (n, name) in names.iter().enumerate() {
        store.add_challenge(name).await;
        store.put_instances(&many(name, n)).await;
    }
    // An instance without a challenge is left out.
    store.put_instances(&many("ab", 1)).await;
    let listed: Vec<_> = store.challenges().try_collect().await.unwrap();
    let listed: Vec<_> = listed.iter().map(|(c, instances)| (c.id.as_str(), instances.len())).collect();
    let mut expected: Vec<_> = names.iter().copied().zip(0..).collect();
    expected.sort_unstable();
    assert_eq!(listed, expected);
}

pub(super) async fn source_lists_only_its_own_instances(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    for n in 0..50 {
        let name = format!("web-{n:02}");
        let web = store.add_challenge(&name).await;
        store
            .put_instances(&[
                instance(source_key(&name, "alice"), Phase::Ready),
                instance(source_key(&name, "alice 2"), Phase::Ready),
            ])
            .await;
        store.put_instances(&[instance(pool_key(&name, n), Phase::Ready)]).await;
        if n == 7 {
            store.add_ready_instance(&web, source_key(&name, "bob")).await;
        }
    }
    let own = |who: &'static str| {
        let store = &store;
        async move {
            let own: Vec<_> = store.instances_by_source(Some(&source_id(who))).try_collect().await.unwrap();
            assert!(own.iter().all(|instance| instance.key.assignment == Assignment::Source(source_id(who))));
            own.len()
        }
    };
    assert_eq!((own("alice").await, own("bob").await, own("carol").await), (50, 1, 0));
    let everyone: Vec<_> = store.instances_by_source(None).try_collect().await.unwrap();
    assert_eq!(everyone.len(), 101, "every instance that isn't pooled");
    store.check_invariants().await;
}

pub(super) async fn expired_instances_are_found(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    store.add_challenge("web").await;
    let ending = |name: String, until| Instance { until, ..instance(source_key("web", &name), Phase::Ready) };
    let all: Vec<_> = (0..200).map(|n| ending(format!("team-{n:03}"), Some(timestamp(1000 - n)))).collect();
    store.put_instances(&all).await;
    store.put_instances(&[ending("never".to_owned(), None), instance(pool_key("web", 1), Phase::Ready)]).await;
    let expired =
        |now| store.expired(timestamp(now)).map_ok(|instance| instance.until.unwrap()).try_collect::<Vec<_>>();
    assert_eq!(expired(800).await.unwrap(), []);
    assert_eq!(expired(850).await.unwrap(), (801..=850).map(timestamp).collect::<Vec<_>>(), "in order of expiry");
    assert_eq!(expired(5000).await.unwrap().len(), 200);
    // An instance renewed during the scan is left out.
    let mut walk = store.expired(timestamp(5000));
    walk.next().await.unwrap().unwrap();
    let late = store.stored_instance(&all[0].key).await;
    store
        .rewrite(&late, &Instance { until: Some(timestamp(6000)), ..late.value.clone() }, &long_timeout())
        .await
        .unwrap();
    assert_eq!(walk.try_collect::<Vec<_>>().await.unwrap().len(), 198);
    store.check_invariants().await;
}

pub(super) async fn sweep_cost_depends_on_expired_instances_only(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    store.add_challenge("web").await;
    let mut all = many("web", 1500);
    for (n, instance) in all.iter_mut().enumerate() {
        instance.until = Some(timestamp(1000 + i64::try_from(n).unwrap()));
    }
    let (few, rest) = all.split_at(500);
    for (more, name) in [(few, "among 500"), (rest, "among 1500")] {
        store.put_instances(more).await;
        for (expired, txns) in [(0, 0), (1, 1), (64, 1), (200, 4)] {
            store.core.kv.reset();
            let found: Vec<_> = store.expired(timestamp(999 + expired)).try_collect().await.unwrap();
            assert_eq!(found.len(), usize::try_from(expired).unwrap());
            let calls = store.core.kv.calls();
            let calls = (calls.get("page").copied(), calls.get("txn").copied().unwrap_or(0));
            assert_eq!(calls, (Some(1), txns), "{expired} {name}");
        }
        // A stream that is dropped early reads no more pages.
        store.core.kv.reset();
        assert_eq!(store.expired(timestamp(1200)).take(10).count().await, 10);
        assert_eq!(store.core.kv.calls(), BTreeMap::from([("page", 1), ("txn", 1)]));
    }
}

pub(super) async fn listing_reads_one_revision(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    store.add_challenge("web").await;
    store.put_instances(&many("web", 600)).await;
    let mut listing = store.instances_of(&challenge_id("web"));
    listing.next().await.unwrap().unwrap();
    // A create and a deletion behind the first page.
    store.put_instances(&[instance(source_key("web", "zoe"), Phase::Ready)]).await;
    let last = source_key("web", "team-00599");
    let (guard, _) = store.begin(&last, Intent::Delete, &long_timeout()).await.unwrap();
    guard.commit(Outcome::Remove).await.unwrap();
    let rest: Vec<_> = listing.try_collect().await.unwrap();
    assert_eq!(rest.len(), 599);
    assert!(keys_of(&rest).contains(&last) && !keys_of(&rest).contains(&source_key("web", "zoe")));
}

pub(super) async fn listing_continues_after_compaction(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let names = ["web", "web-2", "web-3"];
    for name in names {
        store.add_challenge(name).await;
        store.put_instances(&many(name, 1000)).await;
    }
    let changed = many("web-2", 1000)[500].key.clone();
    let (mut seen, mut all) = (Vec::new(), store.instances_by_source(None));
    while let Some(instance) = all.try_next().await.unwrap() {
        seen.push(instance.key);
        if seen.len() % 400 == 0 {
            store.core.kv.compact();
        }
        if seen.len() == 10 {
            // An instance that gets an intent during the listing is listed in its new state.
            drop(store.begin(&changed, Intent::Delete, &long_timeout()).await.unwrap());
        }
    }
    let expected: Vec<InstanceKey> =
        names.iter().flat_map(|name| many(name, 1000)).map(|instance| instance.key).collect();
    assert_eq!(seen, expected, "each instance once, in order");
    let mut listing = store.challenges();
    let mut listed = Vec::new();
    while let Some((challenge, own)) = listing.try_next().await.unwrap() {
        store.core.kv.compact();
        listed.push((challenge.id.as_str().to_owned(), own.len()));
    }
    assert_eq!(listed, names.map(|name| (name.to_owned(), 1000)));
    // A record and its intent must be of one revision even if a page ends between them.
    for at in 0..600 {
        let key = many("web", 1000)[at].key.clone();
        let mut all = store.instances_of(&challenge_id("web"));
        if at % 128 > 2 && at % 128 < 126 {
            continue;
        }
        let before = store.stored_instance(&key).await;
        drop(all.next().await.unwrap().unwrap());
        let again = Instance { connection_info: "changed".to_owned(), ..before.value };
        store.rewrite(&store.stored_instance(&key).await, &again, &long_timeout()).await.unwrap();
        let (guard, begun) = store.begin(&key, Intent::Delete, &long_timeout()).await.unwrap();
        store.core.kv.compact();
        let told: Vec<_> =
            all.try_filter(|stored| std::future::ready(stored.value.key == key)).try_collect().await.unwrap();
        assert!(told.iter().all(|told| told.value.phase != Phase::Deleting || told.value == begun), "{told:?}");
        guard.commit(Outcome::Put(Box::new(instance(key.clone(), Phase::Ready)))).await.unwrap();
    }
    store.core.kv.reset();
    assert_eq!(store.census(timestamp(0)).await.unwrap().challenges, 3);
    assert_eq!(store.unfinished(timestamp(0)).await.unwrap().len(), 1);
    let (guard, _) = store.begin(&changed, Intent::Recover, &long_timeout()).await.unwrap();
    guard.commit(Outcome::Remove).await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn census_counts_by_challenge_phase_and_pool(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    assert_eq!(store.census(timestamp(0)).await.unwrap(), gauntlet_domain::Census::default());
    let web = store.add_challenge("web").await;
    store.add_challenge("other").await;
    store.add_ready_instance(&web, source_key("web", "alice")).await;
    let key = store.add_ready_instance(&web, source_key("web", "bob")).await.value.key;
    store.put_instances(&[Instance { until: None, ..instance(pool_key("web", 1), Phase::Ready) }]).await;
    store.put_instances(&[Instance { until: None, ..instance(source_key("web", "carol"), Phase::Ready) }]).await;
    let (guard, _) = store.begin(&key, Intent::Delete, &long_timeout()).await.unwrap();
    let census = store.census(timestamp(70)).await.unwrap();
    assert_eq!((census.challenges, census.overdue), (2, 2));
    let expected = [
        ((challenge_id("web"), PhaseName::Ready, false), 2),
        ((challenge_id("web"), PhaseName::Ready, true), 1),
        ((challenge_id("web"), PhaseName::Deleting, false), 1),
    ];
    assert_eq!(census.instances, expected.into_iter().collect());
    assert_eq!(store.census(timestamp(69)).await.unwrap().overdue, 0);
    guard.commit(Outcome::Remove).await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn pools_are_listed(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    store.add_challenge("none").await;
    store.add_challenge("leftover").await;
    store
        .put_instances(&[
            instance(pool_key("leftover", 1), Phase::Ready),
            instance(pool_key("leftover", 2), Phase::Ready),
        ])
        .await;
    let kept = Challenge { bounds: PoolBounds::new(1, 2).unwrap(), ..challenge("kept") };
    store.insert_challenge(&kept).await.unwrap();
    store.put_instances(&[instance(pool_key("kept", 3), Phase::Ready)]).await;
    assert_eq!(store.pools().await.unwrap(), vec![challenge_id("kept"), challenge_id("leftover")]);
    store.check_invariants().await;
}

pub(super) async fn pool_is_counted_by_its_keys(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = Challenge { bounds: PoolBounds::new(2, 5).unwrap(), ..challenge("web") };
    store.insert_challenge(&web).await.unwrap();
    let sources = ["alice", "bob", "carol"].map(|who| instance(source_key("web", who), Phase::Ready));
    store.put_instances(&sources).await;
    let phases = [Phase::Ready, Phase::Provisioning, Phase::Deleting, Phase::Ready, Phase::Updating];
    let pooled: Vec<_> = (1..).zip(phases).map(|(bits, phase)| instance(pool_key("web", bits), phase)).collect();
    store.put_instances(&pooled).await;
    // Instances that are owned or unreadable count by their keys.
    let _owned = store.begin(&source_key("web", "bob"), Intent::Delete, &long_timeout()).await.unwrap();
    let _drained = store.begin(&pool_key("web", 1), Intent::Delete, &long_timeout()).await.unwrap();
    store.put_raw(store.core.layout.instance(&pool_key("web", 4)), "not json").await;
    store.put_raw(store.core.layout.instance(&source_key("web", "carol")), "not json").await;
    // Instances of a challenge with a similar ID do not count.
    store
        .put_instances(&[
            instance(source_key("web-1", "x"), Phase::Ready),
            instance(pool_key("web-1", 9), Phase::Ready),
        ])
        .await;
    let pool = store.pool(&challenge_id("web"), 5, 9).await.unwrap();
    let names =
        [PhaseName::Deleting, PhaseName::Provisioning, PhaseName::Deleting, PhaseName::Ready, PhaseName::Updating];
    let expected: Vec<_> = (1..).zip(names).map(|(bits, phase)| (pool_key("web", bits), phase)).collect();
    assert_eq!((pool.claimed, pool.pooled), (3, expected.clone()));
    let part = store.pool(&challenge_id("web"), 2, 3).await.unwrap();
    assert_eq!((part.claimed, part.pooled, part.version), (2, expected[..3].to_vec(), pool.version));
}

pub(super) async fn unreadable_records_hide_no_others(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    for name in ["a", "b", "c"] {
        let stored = store.add_challenge(name).await;
        for who in ["x", "y", "z"] {
            store.add_ready_instance(&stored, source_key(name, who)).await;
        }
    }
    store.put_instances(&[1, 2, 3].map(|bits| instance(pool_key("a", bits), Phase::Ready))).await;
    let layout = store.core.layout.clone();
    store.put_raw(layout.challenge(&challenge_id("b")), "{\"v\":2}").await;
    store.put_raw(layout.instance(&source_key("a", "y")), "not json").await;
    store.put_raw(layout.instance(&source_key("c", "x")), "{\"v\":1,\"identity\":\"0000000000000007\"}").await;
    store.put_raw(layout.intent(&source_key("c", "z")), "{}").await;
    store.put_raw(layout.instance(&pool_key("a", 2)), "").await;

    let listed: Vec<_> = store.challenges().try_collect().await.unwrap();
    let names: Vec<_> = listed.iter().map(|(c, instances)| (c.id.as_str(), instances.len())).collect();
    assert_eq!(names, [("a", 4), ("c", 1)]);
    let mine: Vec<_> = store.instances_by_source(Some(&source_id("y"))).try_collect().await.unwrap();
    assert_eq!(mine.len(), 2);
    assert_eq!(store.snapshot(&challenge_id("a"), &source_id("x")).await.unwrap().pooled.len(), 2);
    assert_eq!(
        store.census(timestamp(0)).await.unwrap().instances.values().sum::<u64>(),
        12,
        "unreadable records are counted"
    );

    let text = store.challenge(&challenge_id("b")).await.unwrap_err().to_string();
    assert!(text.contains("version 2") && text.contains("challenges b"), "{text}");
    assert!(matches!(store.instance(&source_key("a", "y")).await, Err(Error::Internal(_))));
    assert!(matches!(store.snapshot(&challenge_id("a"), &source_id("y")).await, Err(Error::Internal(_))));
    assert!(matches!(
        store.begin(&source_key("a", "y"), Intent::Delete, &long_timeout()).await,
        Err(Error::Internal(_))
    ));
    eventually("nothing is owned", || async { store.live_keys().await.is_empty() }).await;
}

/// Asserts that the calls since the last reset were about `most` pages and cheap. For each page etcd scans to the end of the requested range.
async fn assert_cheap_pages<K: TestKv>(store: &Coordination<K>, most: usize) {
    let (calls, asked) = (store.core.kv.calls(), store.core.kv.page_ranges());
    assert_eq!(calls.keys().copied().collect::<Vec<_>>(), ["page"], "a listing only reads pages");
    // Parts of the range end within pages, and finding their ends takes pages, too.
    assert!(calls["page"] <= most + most / 4 + 3, "{calls:?} for {most}");
    let mut walked = 0;
    for keys in asked {
        walked += store.core.kv.count(keys, None).await.unwrap();
    }
    // The first four pages scan the whole range, the others at most four pages' worth.
    assert!(walked < most as u64 * 256 * (4 + 4), "{walked} keys scanned for {most} pages");
    store.core.kv.reset();
}

pub(super) async fn listing_of_many_pages_holds_one_at_a_time(fixture: &impl Fixture) {
    const CHALLENGES: usize = 1000;
    const EACH: usize = 10;
    let store = fixture.replica("a");
    let layout = store.core.layout.clone();
    let names: Vec<String> = (0..CHALLENGES).map(|n| format!("web-{n:04}")).collect();
    for some in names.chunks(100) {
        let puts = some
            .iter()
            .map(|name| Op::put(layout.challenge(&challenge_id(name)), records::write_challenge(&challenge(name))));
        store.core.kv.txn(Txn { success: puts.collect(), ..Txn::default() }).await.unwrap();
    }
    for some in names.chunks(3) {
        store.put_instances(&some.iter().flat_map(|name| many(name, EACH)).collect::<Vec<_>>()).await;
    }
    store.core.kv.reset();
    // Two scans in parallel, each holding one page.
    let mut listing = store.challenges();
    let (mut challenges, mut instances) = (0, 0);
    while let Some((_, own)) = listing.try_next().await.unwrap() {
        challenges += 1;
        instances += own.len();
        let read = store.core.kv.calls()["page"];
        let pages = challenges / 256 + instances / 256;
        assert!(read <= pages + pages / 4 + 5, "read ahead: {read} pages for {instances}");
    }
    assert_eq!((challenges, instances), (CHALLENGES, CHALLENGES * EACH));
    assert_cheap_pages(&store, CHALLENGES / 256 + CHALLENGES * EACH / 256 + 2).await;
    let all: usize = store.instances_by_source(None).try_fold(0, |n, _| async move { Ok(n + 1) }).await.unwrap();
    assert_eq!(all, CHALLENGES * EACH);
    assert_cheap_pages(&store, CHALLENGES * EACH / 256 + 1).await;
    let census = store.census(timestamp(0)).await.unwrap();
    assert_eq!((census.challenges, census.instances.values().sum::<u64>()), (1000, 10_000));
    assert_eq!(store.core.kv.calls(), BTreeMap::from([("count", 2), ("page", 4)]), "keys only");
}

pub(super) async fn any_text_is_a_valid_id(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let texts =
        ["../../etc/passwd", " ", "!", "! !", "%2F", "a b", "a  b", "s", "intent", "\u{202e}x", &"\u{e9}".repeat(128)];
    for name in texts {
        let stored = store.add_challenge(name).await;
        for who in texts {
            store.add_ready_instance(&stored, source_key(name, who)).await;
        }
    }
    store.check_invariants().await;
    for name in texts {
        let all: Vec<_> = store.instances_of(&challenge_id(name)).try_collect().await.unwrap();
        assert_eq!(keys_of(&all), texts.iter().map(|who| source_key(name, who)).collect());
        let own: Vec<_> = store.instances_by_source(Some(&source_id(name))).try_collect().await.unwrap();
        assert_eq!(own.len(), texts.len());
    }
}

pub(super) async fn store_id_is_set_once(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let (one, two) = futures::join!(store.store_id("one"), other.store_id("two"));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert!(one == two && ["one", "two"].contains(&one.as_str()), "{one} and {two}");
    assert_eq!(fixture.replica("c").store_id("three").await, Ok(one.clone()));
    // A retry after a lost response returns the stored ID.
    store.core.kv.inject(Fault::LostResponse);
    assert!(matches!(store.store_id("four").await, Err(Error::Unavailable { .. })));
    assert_eq!(store.store_id("four").await, Ok(one));
}
