//! What Kata's clients see: four calls, Kata's field names, a superset of its JSON.

use serde_json::Value;
use vmcache::factory::grpccache::GrpcCache;
use vmcache::vm::wire::from_wire;

use crate::daemon::{assert_nothing_left, Daemon, Options};
use crate::require_qemu;

/// Every key of `theirs` must be in `ours`, objects all the way down.
fn assert_superset(ours: &Value, theirs: &Value, path: &str) {
    let Some(map) = theirs.as_object() else { return };
    for (key, value) in map {
        let found = ours.get(key).unwrap_or_else(|| panic!("{path}.{key} is missing in {ours}"));
        assert_superset(found, value, &format!("{path}.{key}"));
    }
}

#[test]
fn the_four_calls_have_katas_shape() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    daemon.wait_rest(1);
    let client = GrpcCache::connect(&daemon.socket()).unwrap();

    let config = client.fetch_config().unwrap();
    assert_eq!(config.hypervisor_type, "qemu");
    assert_eq!(config.agent_type.as_deref(), Some("kata"));
    assert_eq!((config.cpus(), config.memory()), (1, 256));

    let status = client.fetch_status().unwrap();
    assert_eq!(status.pid, i64::from(daemon.pid()));
    assert_eq!(status.vmstatus.len(), 1);
    assert_eq!((status.vmstatus[0].cpu, status.vmstatus[0].memory), (1, 256));

    let vm = client.claim_raw(Some(crate::daemon::LONG)).unwrap();
    assert_eq!((vm.cpu, vm.memory, vm.cpuDelta), (1, 256, 0));
    let ours: Value = serde_json::from_slice(&vm.hypervisor).unwrap();
    let captured = include_str!("../fixtures/kata-1.13/vm.hypervisor.json");
    assert_superset(&ours, &serde_json::from_str(captured).unwrap(), "hypervisor");
    let pid = ours["Vmcache"]["Pid"].as_i64().unwrap();
    assert_eq!(pid, status.vmstatus[0].pid);
    // QMP serves one client at a time: the server must have let go of it.
    let monitor = ours["QmpChannelpath"].as_str().unwrap();
    let mut qmp = vmcache::hypervisor::qemu::qmp::Qmp::connect(
        std::path::Path::new(monitor),
        crate::daemon::LONG,
    )
    .unwrap();
    assert!(!qmp.running().unwrap(), "a VM of the pool is paused");
    drop(qmp);

    let mut vm = from_wire(&vm, || Err(String::new())).unwrap();
    vm.wake().unwrap();
    vm.destroy();
    client.quit().unwrap();
    let mut daemon = daemon;
    assert!(daemon.wait().success());
    assert_nothing_left(&daemon.dir.0);
}
