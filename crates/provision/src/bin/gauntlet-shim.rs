//! The supervisor of one instance, as a program of its own, which is smaller than the manager.

fn main() {
    gauntlet_provision::process::supervisor::run_if_requested();
    eprintln!("gauntlet-shim supervises one instance; only the manager starts it");
    std::process::exit(64);
}
