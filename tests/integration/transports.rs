//! Our own agent over each transport that CI has: the walk of `conformance`, and a
//! vsock device of somebody else's.

use std::path::Path;

use vmcache::config::Config;
use vmcache::factory::{direct, Wanted};
use vmcache::process::attendant::{Attendant, Role};
use vmcache::sys::cage::Cage;

use crate::conformance::{assert_walked, walk};
use crate::daemon::{assert_nothing_left, for_all_users, wait_for, Dir, Options, LONG};
use crate::require_qemu;

#[test]
fn our_agent_over_serial_ports() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let options = Options::pool(&prepared, 1);
    assert_walked(&walk(&options, &dir), &[]);
}

#[test]
fn our_agent_over_vsock_in_user_space() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let mut options = Options::pool(&prepared, 1);
    options.more_ours.push_str(&vsock_device(&prepared));
    assert_walked(&walk(&options, &dir), &[]);
}

#[test]
fn a_vsock_device_of_somebody_elses() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let (qemus, hosts) = (dir.0.join("qemu.sock"), dir.0.join("host.sock"));
    let program = prepared.join("bin/vhost-device-vsock");
    let args = ["--guest-cid", "3", "--socket", qemus.to_str().unwrap(), "--uds-path"];
    let args = args.into_iter().chain(hosts.to_str()).map(Into::into).collect::<Vec<_>>();
    let device =
        Attendant::start(Role::Vsock, &program, &args, &[], true, Cage::default()).unwrap();
    wait_for("the device's socket", || qemus.exists());
    let mut options = Options::pool(&prepared, 1);
    options.more_ours.push_str(&format!(
        "transport = \"vhost-user-vsock\"\nvsock_sockets = \"{},{}\"\n",
        qemus.display(),
        hosts.display()
    ));
    let config = Config::parse(Path::new("test.toml"), &options.text(&dir.0)).unwrap();
    let (vm, agent) = direct::cold(&config, &Wanted::default(), true, &|_| {}).unwrap();
    assert_eq!(agent.agent_url(), format!("hvsock://{}:1024", hosts.display()));
    agent.check(LONG).unwrap();
    agent.disconnect();
    vm.destroy();
    // It is not ours to end.
    assert!(device.alive());
    drop(device);
    assert_nothing_left(&dir.0);
}

/// Options for vsock in user space, with the device that `tests/run` has built.
pub fn vsock_device(prepared: &Path) -> String {
    let device = for_all_users(&prepared.join("bin/vhost-device-vsock"));
    format!("transport = \"vhost-user-vsock\"\nvsock_device = {device:?}\n")
}
