//! Who may connect, and what they get.

use std::fs;

use super::{finding, good, Finding, State};
use crate::config::options::OURS;
use crate::config::{Config, MAX_SOCKET_PATH};
use crate::confine::admission::Admission;
use crate::report::chain;

/// The socket, its directory, the store.
pub fn access(config: &Config) -> Vec<Finding> {
    let mut all = vec![socket(config), store(config), claims(config)];
    if let Err(e) = config.check_places() {
        all.push(finding("paths", State::Missing, chain(&e), ""));
    }
    all
}

fn socket(config: &Config) -> Finding {
    let path = config.endpoint();
    let length = path.as_os_str().len();
    let text = format!("{} ({length} of {MAX_SOCKET_PATH} bytes)", path.display());
    match path.parent().and_then(|d| fs::metadata(d).ok()) {
        None => finding(
            "socket",
            State::Missing,
            format!("{text}: its directory does not exist"),
            "make it, or change vm_cache_endpoint",
        ),
        Some(_) => good("socket", format!("{text}, mode {:04o}", config.socket_mode)),
    }
}

fn store(config: &Config) -> Finding {
    let store = config.store();
    let near = store.ancestors().find(|p| p.exists()).unwrap_or(&store);
    match nix::unistd::access(near, nix::unistd::AccessFlags::W_OK) {
        Ok(()) => good("store", format!("{} can be written", store.display())),
        Err(e) => finding(
            "store",
            State::Missing,
            format!("{}: {e}", near.display()),
            "run it as root, or choose a vm_store_path of this user's",
        ),
    }
}

fn claims(config: &Config) -> Finding {
    let open = config.socket_mode & 0o066 != 0;
    let group = config.text(OURS, "socket_group");
    let own = nix::unistd::geteuid().as_raw();
    let who = match (config.socket_mode & 0o006 != 0, group) {
        (true, _) => "any user may connect".to_string(),
        (false, "") if !open => format!("root and uid {own} may connect"),
        (false, "") => "the server's group may connect".to_string(),
        (false, group) => format!("group {group} may connect"),
    };
    match Admission::of(config) {
        Err((key, why)) => finding("who may claim", State::Missing, why, format!("mend {key}")),
        Ok(admission) if open && !admission.gives() => finding(
            "who may claim",
            State::Note,
            format!("{who}, but only root and uid {own} may claim"),
            "run the server as root, with `user` left out, so that VMs can be given to others",
        ),
        Ok(_) => good("who may claim", who),
    }
}
