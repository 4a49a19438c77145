//! Generates types, clients and servers from `proto/`. Needs no protoc.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    let out = env::var_os("OUT_DIR").map(PathBuf::from).ok_or("OUT_DIR is not set: run this through cargo")?;
    println!("cargo:rerun-if-changed=proto");
    let generate = |set: &str, files: &[&str]| -> Result<(), Box<dyn Error>> {
        let descriptors = protox::compile(files, ["proto"])?;
        fs::write(out.join(set), descriptors.encode_to_vec())?;
        let mut prost = tonic_prost_build::Config::new();
        prost
            // The JSON mapping looks up descriptors by message name.
            .enable_type_names()
            // Ordered maps, so that equal messages have equal bytes and equal JSON.
            .btree_map(["."]);
        Ok(tonic_prost_build::configure().compile_fds_with_config(descriptors, prost)?)
    };
    generate("api.v1.binpb", &["api/v1/challenge/challenge.proto", "api/v1/instance/instance.proto"])?;
    generate("gauntlet.v1.binpb", &["gauntlet/v1/sweeper.proto"])
}
