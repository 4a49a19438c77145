//! Records, owner keys, locks and indexes on etcd or one embedded store.
