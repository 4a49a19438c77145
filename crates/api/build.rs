//! Generates types, clients and servers from `proto/`.

use std::{env, io, path::PathBuf};

fn main() -> io::Result<()> {
    let out = env::var_os("OUT_DIR")
        .map(PathBuf::from)
        .ok_or_else(|| io::Error::other("OUT_DIR is not set: this runs under cargo only"))?;
    let generate = |set: &str, files: &[&str]| {
        let mut prost = tonic_prost_build::Config::new();
        prost
            // The JSON mapping finds a message's descriptor by its name.
            .enable_type_names()
            // Maps in key order: the same message is the same bytes and the same JSON.
            .btree_map(["."])
            .file_descriptor_set_path(out.join(set));
        tonic_prost_build::configure().compile_with_config(prost, files, &["proto"])
    };
    generate("api.v1.binpb", &["proto/api/v1/challenge/challenge.proto", "proto/api/v1/instance/instance.proto"])?;
    generate("gauntlet.v1.binpb", &["proto/gauntlet/v1/sweeper.proto"])
}
