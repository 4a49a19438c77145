//! Challenges, and everything that only reads.

use futures::StreamExt as _;

use super::*;

pub(super) async fn a_challenge_is_inserted_once(rig: &impl Rig) {
    let store = rig.replica("a");
    let full = Challenge {
        timeout: Some(Duration::new(u64::MAX, 999_999_999)),
        until: Some(at(1_000_000)),
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
    assert_eq!(store.stored("web").await.value, full);
    assert_eq!(store.challenge(&id("other")).await.unwrap(), None);
    store.ping().await.unwrap();
    store.check().await;
}

pub(super) async fn a_challenge_changes_under_its_lock(rig: &impl Rig) {
    let store = rig.replica("a");
    let read = store.with("web").await;
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    let changed = Challenge { bounds: PoolBounds::new(3, 0).unwrap(), deleting: true, ..read.value.clone() };
    held.update_challenge(&changed).await.unwrap();
    let now = store.stored("web").await;
    assert_eq!(now.value, changed);
    assert!(now.version.0 > read.version.0);
    assert!(store.live_keys().await.is_empty(), "the lock went with it");
    store.check().await;
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    held.update_challenge(&read.value).await.unwrap();
    store.check().await;
    let held = store.lock(LockKind::Challenge, &id("gone"), &patient()).await.unwrap();
    let result = held.update_challenge(&challenge("gone")).await;
    assert_eq!(result, Err(Error::ChallengeNotFound(id("gone"))));
    let held = store.lock(LockKind::Challenge, &id("other"), &patient()).await.unwrap();
    assert!(matches!(held.update_challenge(&read.value).await, Err(Error::Internal(_))), "another's lock");
    let held = store.lock(LockKind::Rollout, &id("web"), &patient()).await.unwrap();
    assert!(matches!(held.update_challenge(&read.value).await, Err(Error::Internal(_))), "another kind");
    store.check().await;
}

pub(super) async fn a_challenge_with_instances_is_not_removed(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    let key = store.ready(&web, instance_key("web", "alice")).await.value.key;
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    assert_eq!(held.remove_challenge().await, Err(Error::Conflict));
    eventually("the lock is given up", || async { store.live_keys().await.is_empty() }).await;
    let (held, _) = store.begin(&key, Intent::Delete, &patient()).await.unwrap();
    held.commit(Outcome::Remove).await.unwrap();
    // Its neighbours do not count.
    let other = store.with("web 2").await;
    store.ready(&other, instance_key("web 2", "alice")).await;
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    held.remove_challenge().await.unwrap();
    assert_eq!(store.challenge(&id("web")).await.unwrap(), None);
    store.check().await;
    store.with("web").await;
}

pub(super) async fn a_survey_answers_all_at_once(rig: &impl Rig) {
    let store = rig.replica("a");
    let empty = store.snapshot(&id("web"), &source("alice")).await.unwrap();
    assert!(empty.challenge.is_none() && empty.instance.is_none() && empty.pooled.is_empty());
    let web = store.with("web").await;
    let mine = store.ready(&web, instance_key("web", "alice")).await;
    store.ready(&web, instance_key("web", "bob")).await;
    let pool: Vec<Instance> =
        (0..40).map(|bits| Instance { until: None, ..instance(pooled_key("web", bits), Phase::Ready) }).collect();
    store.put(&pool).await;
    let (held, _) = store.begin(&pool[3].key, Intent::Delete, &patient()).await.unwrap();
    let snapshot = store.snapshot(&id("web"), &source("alice")).await.unwrap();
    assert_eq!(snapshot.challenge, Some(web));
    assert_eq!(snapshot.instance, Some(mine));
    assert_eq!(snapshot.pooled.len(), 16);
    assert!(snapshot.pooled.iter().all(|stored| stored.value.phase == Phase::Ready && stored.value.key != pool[3].key));
    held.commit(Outcome::Remove).await.unwrap();
    store.check().await;
}

pub(super) async fn a_survey_finds_the_ready_behind_the_others(rig: &impl Rig) {
    let store = rig.replica("a");
    store.with("web").await;
    let phase = |bits| if bits == 90 { Phase::Ready } else { Phase::Provisioning };
    let pool: Vec<Instance> = (0..100).map(|bits| instance(pooled_key("web", bits), phase(bits))).collect();
    store.put(&pool).await;
    let snapshot = store.snapshot(&id("web"), &source("alice")).await.unwrap();
    assert_eq!(keys_of(&snapshot.pooled), BTreeSet::from([pooled_key("web", 90)]));
}

fn many(challenge: &str, count: usize) -> Vec<Instance> {
    (0..count).map(|n| instance(instance_key(challenge, &format!("team-{n:05}")), Phase::Ready)).collect()
}

pub(super) async fn all_is_listed_over_many_pages(rig: &impl Rig) {
    let store = rig.replica("a");
    store.with("web").await;
    let all = many("web", 1300);
    store.put(&all).await;
    // Pages end between a record and its intent, too.
    let mut held = Vec::new();
    for at in [254, 255, 256, 510] {
        held.push(store.begin(&all[at].key, Intent::Delete, &patient()).await.unwrap().0);
    }
    let listed: Vec<_> = store.instances_of(&id("web")).try_collect().await.unwrap();
    assert_eq!(listed.len(), 1300);
    assert_eq!(keys_of(&listed), all.iter().map(|instance| instance.key.clone()).collect());
    assert_eq!(listed.iter().filter(|stored| stored.value.phase == Phase::Deleting).count(), 4);
    let everyone: Vec<_> = store.instances_by_source(None).try_collect().await.unwrap();
    assert_eq!(everyone.len(), 1300);
    for held in held {
        held.commit(Outcome::Remove).await.unwrap();
    }
    assert_eq!(store.census(at(0)).await.unwrap().instances.values().sum::<u64>(), 1296);
    store.check().await;
}

pub(super) async fn challenges_come_in_order_with_their_instances(rig: &impl Rig) {
    let store = rig.replica("a");
    let names = ["a", "a b", "a!", "a-b", "b", "z", "\u{e9}", "\u{1F600}"];
    for (n, name) in names.iter().enumerate() {
        store.with(name).await;
        store.put(&many(name, n)).await;
    }
    // One whose challenge is not there belongs to none.
    store.put(&many("ab", 1)).await;
    let listed: Vec<_> = store.challenges().try_collect().await.unwrap();
    let listed: Vec<_> = listed.iter().map(|(c, instances)| (c.id.as_str(), instances.len())).collect();
    let mut expected: Vec<_> = names.iter().copied().zip(0..).collect();
    expected.sort_unstable();
    assert_eq!(listed, expected);
}

pub(super) async fn a_source_finds_its_own(rig: &impl Rig) {
    let store = rig.replica("a");
    for n in 0..50 {
        let name = format!("web-{n:02}");
        let web = store.with(&name).await;
        store
            .put(&[
                instance(instance_key(&name, "alice"), Phase::Ready),
                instance(instance_key(&name, "alice 2"), Phase::Ready),
            ])
            .await;
        store.put(&[instance(pooled_key(&name, n), Phase::Ready)]).await;
        if n == 7 {
            store.ready(&web, instance_key(&name, "bob")).await;
        }
    }
    let own = |who: &'static str| {
        let store = &store;
        async move {
            let own: Vec<_> = store.instances_by_source(Some(&source(who))).try_collect().await.unwrap();
            assert!(own.iter().all(|instance| instance.key.assignment == Assignment::Source(source(who))));
            own.len()
        }
    };
    assert_eq!((own("alice").await, own("bob").await, own("carol").await), (50, 1, 0));
    let everyone: Vec<_> = store.instances_by_source(None).try_collect().await.unwrap();
    assert_eq!(everyone.len(), 101, "all but the pooled");
    store.check().await;
}

pub(super) async fn the_expired_are_found(rig: &impl Rig) {
    let store = rig.replica("a");
    store.with("web").await;
    let ending = |name: String, until| Instance { until, ..instance(instance_key("web", &name), Phase::Ready) };
    let all: Vec<_> = (0..200).map(|n| ending(format!("team-{n:03}"), Some(at(1000 - n)))).collect();
    store.put(&all).await;
    store.put(&[ending("never".to_owned(), None), instance(pooled_key("web", 1), Phase::Ready)]).await;
    let expired = |now| store.expired(at(now)).map_ok(|instance| instance.until.unwrap()).try_collect::<Vec<_>>();
    assert_eq!(expired(800).await.unwrap(), []);
    assert_eq!(expired(850).await.unwrap(), (801..=850).map(at).collect::<Vec<_>>(), "the longest overdue first");
    assert_eq!(expired(5000).await.unwrap().len(), 200);
    // What is renewed while the index is walked is left out.
    let mut walk = store.expired(at(5000));
    walk.next().await.unwrap().unwrap();
    let late = store.at(&all[0].key).await;
    store.rewrite(&late, &Instance { until: Some(at(6000)), ..late.value.clone() }, &patient()).await.unwrap();
    assert_eq!(walk.try_collect::<Vec<_>>().await.unwrap().len(), 198);
    store.check().await;
}

pub(super) async fn a_sweep_costs_what_has_expired(rig: &impl Rig) {
    let store = rig.replica("a");
    store.with("web").await;
    let mut all = many("web", 1500);
    for (n, instance) in all.iter_mut().enumerate() {
        instance.until = Some(at(1000 + i64::try_from(n).unwrap()));
    }
    let (few, rest) = all.split_at(500);
    for (more, name) in [(few, "among 500"), (rest, "among 1500")] {
        store.put(more).await;
        for (expired, txns) in [(0, 0), (1, 1), (64, 1), (200, 4)] {
            store.core.kv.reset();
            let found: Vec<_> = store.expired(at(999 + expired)).try_collect().await.unwrap();
            assert_eq!(found.len(), usize::try_from(expired).unwrap());
            let calls = store.core.kv.calls();
            let calls = (calls.get("page").copied(), calls.get("txn").copied().unwrap_or(0));
            assert_eq!(calls, (Some(1), txns), "{expired} {name}");
        }
        // What is not asked for is not read.
        store.core.kv.reset();
        assert_eq!(store.expired(at(1200)).take(10).count().await, 10);
        assert_eq!(store.core.kv.calls(), BTreeMap::from([("page", 1), ("txn", 1)]));
    }
}

pub(super) async fn a_list_is_of_one_revision(rig: &impl Rig) {
    let store = rig.replica("a");
    store.with("web").await;
    store.put(&many("web", 600)).await;
    let mut listing = store.instances_of(&id("web"));
    listing.next().await.unwrap().unwrap();
    // Late ones, and a late removal, behind the first page.
    store.put(&[instance(instance_key("web", "zoe"), Phase::Ready)]).await;
    let last = instance_key("web", "team-00599");
    let (held, _) = store.begin(&last, Intent::Delete, &patient()).await.unwrap();
    held.commit(Outcome::Remove).await.unwrap();
    let rest: Vec<_> = listing.try_collect().await.unwrap();
    assert_eq!(rest.len(), 599);
    assert!(keys_of(&rest).contains(&last) && !keys_of(&rest).contains(&instance_key("web", "zoe")));
}

pub(super) async fn a_list_goes_on_where_its_revision_is_compacted(rig: &impl Rig) {
    let store = rig.replica("a");
    let names = ["web", "web-2", "web-3"];
    for name in names {
        store.with(name).await;
        store.put(&many(name, 1000)).await;
    }
    let changed = many("web-2", 1000)[500].key.clone();
    let (mut seen, mut all) = (Vec::new(), store.instances_by_source(None));
    while let Some(instance) = all.try_next().await.unwrap() {
        seen.push(instance.key);
        if seen.len() % 400 == 0 {
            store.core.kv.compact();
        }
        if seen.len() == 10 {
            // One that is changed, and has another by its record, is told as it is by then.
            drop(store.begin(&changed, Intent::Delete, &patient()).await.unwrap());
        }
    }
    let expected: Vec<InstanceKey> =
        names.iter().flat_map(|name| many(name, 1000)).map(|instance| instance.key).collect();
    assert_eq!(seen, expected, "each once, and none left out");
    let mut listing = store.challenges();
    let mut listed = Vec::new();
    while let Some((challenge, own)) = listing.try_next().await.unwrap() {
        store.core.kv.compact();
        listed.push((challenge.id.as_str().to_owned(), own.len()));
    }
    assert_eq!(listed, names.map(|name| (name.to_owned(), 1000)));
    // The record of one page and the intent of the next would be of two revisions.
    for at in 0..600 {
        let key = many("web", 1000)[at].key.clone();
        let mut all = store.instances_of(&id("web"));
        if at % 128 > 2 && at % 128 < 126 {
            continue;
        }
        let before = store.at(&key).await;
        drop(all.next().await.unwrap().unwrap());
        let again = Instance { connection_info: "changed".to_owned(), ..before.value };
        store.rewrite(&store.at(&key).await, &again, &patient()).await.unwrap();
        let (held, begun) = store.begin(&key, Intent::Delete, &patient()).await.unwrap();
        store.core.kv.compact();
        let told: Vec<_> =
            all.try_filter(|stored| std::future::ready(stored.value.key == key)).try_collect().await.unwrap();
        assert!(told.iter().all(|told| told.value.phase != Phase::Deleting || told.value == begun), "{told:?}");
        held.commit(Outcome::Put(Box::new(instance(key.clone(), Phase::Ready)))).await.unwrap();
    }
    store.core.kv.reset();
    assert_eq!(store.census(at(0)).await.unwrap().challenges, 3);
    assert_eq!(store.unfinished(at(0)).await.unwrap().len(), 1);
    let (held, _) = store.begin(&changed, Intent::Recover, &patient()).await.unwrap();
    held.commit(Outcome::Remove).await.unwrap();
    store.check().await;
}

pub(super) async fn a_census_counts(rig: &impl Rig) {
    let store = rig.replica("a");
    assert_eq!(store.census(at(0)).await.unwrap(), gauntlet_domain::Census::default());
    let web = store.with("web").await;
    store.with("other").await;
    store.ready(&web, instance_key("web", "alice")).await;
    let key = store.ready(&web, instance_key("web", "bob")).await.value.key;
    store.put(&[Instance { until: None, ..instance(pooled_key("web", 1), Phase::Ready) }]).await;
    store.put(&[Instance { until: None, ..instance(instance_key("web", "carol"), Phase::Ready) }]).await;
    let (held, _) = store.begin(&key, Intent::Delete, &patient()).await.unwrap();
    let census = store.census(at(70)).await.unwrap();
    assert_eq!((census.challenges, census.overdue), (2, 2));
    let expected = [
        ((id("web"), PhaseName::Ready, false), 2),
        ((id("web"), PhaseName::Ready, true), 1),
        ((id("web"), PhaseName::Deleting, false), 1),
    ];
    assert_eq!(census.instances, expected.into_iter().collect());
    assert_eq!(store.census(at(69)).await.unwrap().overdue, 0);
    held.commit(Outcome::Remove).await.unwrap();
    store.check().await;
}

pub(super) async fn pools_are_found(rig: &impl Rig) {
    let store = rig.replica("a");
    store.with("none").await;
    store.with("leftover").await;
    store
        .put(&[instance(pooled_key("leftover", 1), Phase::Ready), instance(pooled_key("leftover", 2), Phase::Ready)])
        .await;
    let kept = Challenge { bounds: PoolBounds::new(1, 2).unwrap(), ..challenge("kept") };
    store.insert_challenge(&kept).await.unwrap();
    store.put(&[instance(pooled_key("kept", 3), Phase::Ready)]).await;
    assert_eq!(store.pools().await.unwrap(), vec![id("kept"), id("leftover")]);
    store.check().await;
}

pub(super) async fn a_pool_is_counted_by_its_keys(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = Challenge { bounds: PoolBounds::new(2, 5).unwrap(), ..challenge("web") };
    store.insert_challenge(&web).await.unwrap();
    let sources = ["alice", "bob", "carol"].map(|who| instance(instance_key("web", who), Phase::Ready));
    store.put(&sources).await;
    let phases = [Phase::Ready, Phase::Provisioning, Phase::Deleting, Phase::Ready, Phase::Updating];
    let pooled: Vec<_> = (1..).zip(phases).map(|(bits, phase)| instance(pooled_key("web", bits), phase)).collect();
    store.put(&pooled).await;
    // What an owner is at, and what cannot be read, counts as it stands in the keys.
    let _owned = store.begin(&instance_key("web", "bob"), Intent::Delete, &patient()).await.unwrap();
    let _drained = store.begin(&pooled_key("web", 1), Intent::Delete, &patient()).await.unwrap();
    store.garble(store.core.layout.instance(&pooled_key("web", 4)), "not json").await;
    store.garble(store.core.layout.instance(&instance_key("web", "carol")), "not json").await;
    // Neighbours of the same letters do not.
    store
        .put(&[instance(instance_key("web-1", "x"), Phase::Ready), instance(pooled_key("web-1", 9), Phase::Ready)])
        .await;
    let pool = store.pool(&id("web"), 5, 9).await.unwrap();
    let names =
        [PhaseName::Deleting, PhaseName::Provisioning, PhaseName::Deleting, PhaseName::Ready, PhaseName::Updating];
    let expected: Vec<_> = (1..).zip(names).map(|(bits, phase)| (pooled_key("web", bits), phase)).collect();
    assert_eq!((pool.claimed, pool.pooled), (3, expected.clone()));
    let part = store.pool(&id("web"), 2, 3).await.unwrap();
    assert_eq!((part.claimed, part.pooled, part.version), (2, expected[..3].to_vec(), pool.version));
}

pub(super) async fn the_unreadable_hides_no_other(rig: &impl Rig) {
    let store = rig.replica("a");
    for name in ["a", "b", "c"] {
        let stored = store.with(name).await;
        for who in ["x", "y", "z"] {
            store.ready(&stored, instance_key(name, who)).await;
        }
    }
    store.put(&[1, 2, 3].map(|bits| instance(pooled_key("a", bits), Phase::Ready))).await;
    let layout = store.core.layout.clone();
    store.garble(layout.challenge(&id("b")), "{\"v\":2}").await;
    store.garble(layout.instance(&instance_key("a", "y")), "not json").await;
    store.garble(layout.instance(&instance_key("c", "x")), "{\"v\":1,\"identity\":\"0000000000000007\"}").await;
    store.garble(layout.intent(&instance_key("c", "z")), "{}").await;
    store.garble(layout.instance(&pooled_key("a", 2)), "").await;

    let listed: Vec<_> = store.challenges().try_collect().await.unwrap();
    let names: Vec<_> = listed.iter().map(|(c, instances)| (c.id.as_str(), instances.len())).collect();
    assert_eq!(names, [("a", 4), ("c", 1)]);
    let mine: Vec<_> = store.instances_by_source(Some(&source("y"))).try_collect().await.unwrap();
    assert_eq!(mine.len(), 2);
    assert_eq!(store.snapshot(&id("a"), &source("x")).await.unwrap().pooled.len(), 2);
    assert_eq!(store.census(at(0)).await.unwrap().instances.values().sum::<u64>(), 12, "they are there");

    let text = store.challenge(&id("b")).await.unwrap_err().to_string();
    assert!(text.contains("version 2") && text.contains("challenges b"), "{text}");
    assert!(matches!(store.instance(&instance_key("a", "y")).await, Err(Error::Internal(_))));
    assert!(matches!(store.snapshot(&id("a"), &source("y")).await, Err(Error::Internal(_))));
    assert!(matches!(store.begin(&instance_key("a", "y"), Intent::Delete, &patient()).await, Err(Error::Internal(_))));
    eventually("nothing is owned", || async { store.live_keys().await.is_empty() }).await;
}

/// The calls so far were so many pages, and each was cheap: etcd walks over what is left of the range that a page begins.
async fn pages<K: Tested>(store: &Coordination<K>, most: usize) {
    let (calls, asked) = (store.core.kv.calls(), store.core.kv.asked());
    assert_eq!(calls.keys().copied().collect::<Vec<_>>(), ["page"], "a list takes no lock and writes nothing");
    // A part of the range ends within a page, and where parts end has to be read.
    assert!(calls["page"] <= most + most / 4 + 3, "{calls:?} for {most}");
    let mut walked = 0;
    for keys in asked {
        walked += store.core.kv.count(keys, None).await.unwrap();
    }
    // The first four pages walk over everything, the others over four pages at most.
    assert!(walked < most as u64 * 256 * (4 + 4), "{walked} keys walked over for {most} pages");
    store.core.kv.reset();
}

pub(super) async fn a_hundred_pages_are_listed_one_at_a_time(rig: &impl Rig) {
    const CHALLENGES: usize = 1000;
    const EACH: usize = 10;
    let store = rig.replica("a");
    let layout = store.core.layout.clone();
    let names: Vec<String> = (0..CHALLENGES).map(|n| format!("web-{n:04}")).collect();
    for some in names.chunks(100) {
        let puts =
            some.iter().map(|name| Op::put(layout.challenge(&id(name)), records::write_challenge(&challenge(name))));
        store.core.kv.txn(Txn { success: puts.collect(), ..Txn::default() }).await.unwrap();
    }
    for some in names.chunks(3) {
        store.put(&some.iter().flat_map(|name| many(name, EACH)).collect::<Vec<_>>()).await;
    }
    store.core.kv.reset();
    // Two walks side by side, each with one page at hand.
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
    pages(&store, CHALLENGES / 256 + CHALLENGES * EACH / 256 + 2).await;
    let all: usize = store.instances_by_source(None).try_fold(0, |n, _| async move { Ok(n + 1) }).await.unwrap();
    assert_eq!(all, CHALLENGES * EACH);
    pages(&store, CHALLENGES * EACH / 256 + 1).await;
    let census = store.census(at(0)).await.unwrap();
    assert_eq!((census.challenges, census.instances.values().sum::<u64>()), (1000, 10_000));
    assert_eq!(store.core.kv.calls(), BTreeMap::from([("count", 2), ("page", 4)]), "keys alone");
}

pub(super) async fn any_text_is_an_id(rig: &impl Rig) {
    let store = rig.replica("a");
    let texts =
        ["../../etc/passwd", " ", "!", "! !", "%2F", "a b", "a  b", "s", "intent", "\u{202e}x", &"\u{e9}".repeat(128)];
    for name in texts {
        let stored = store.with(name).await;
        for who in texts {
            store.ready(&stored, instance_key(name, who)).await;
        }
    }
    store.check().await;
    for name in texts {
        let all: Vec<_> = store.instances_of(&id(name)).try_collect().await.unwrap();
        assert_eq!(keys_of(&all), texts.iter().map(|who| instance_key(name, who)).collect());
        let own: Vec<_> = store.instances_by_source(Some(&source(name))).try_collect().await.unwrap();
        assert_eq!(own.len(), texts.len());
    }
}

pub(super) async fn a_store_is_named_once(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let (one, two) = futures::join!(store.store_id("one"), other.store_id("two"));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert!(one == two && ["one", "two"].contains(&one.as_str()), "{one} and {two}");
    assert_eq!(rig.replica("c").store_id("three").await, Ok(one.clone()));
    // An answer that was lost is asked for again.
    store.core.kv.fail_next(Fault::LostAnswer);
    assert!(matches!(store.store_id("four").await, Err(Error::Unavailable { .. })));
    assert_eq!(store.store_id("four").await, Ok(one));
}
