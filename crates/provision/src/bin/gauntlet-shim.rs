//! The supervisor of one instance, as a program of its own: smaller than the hidden mode of the manager's.

fn main() {
    gauntlet_provision::process::shim::run_if_requested();
    eprintln!("gauntlet-shim supervises one instance; it is started by the manager, not by hand");
    std::process::exit(64);
}
