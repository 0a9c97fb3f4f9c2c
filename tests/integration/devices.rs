//! Which devices a running VM has: those that are named here, each with its reason, and no
//! others. A device that nothing uses is code of QEMU's that a guest can attack for nothing.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{json, Value};
use vmcache::hypervisor::qemu::qmp::{Qmp, QUICK};

use crate::daemon::{directories, Daemon, Dir, Options};
use crate::require_qemu;
use crate::transports::vsock_device;

/// What every machine of QEMU's for x86 has, whatever one says: clocks, interrupts, DMA, the
/// keyboard's controller, by which a kernel resets the machine, and how firmware is configured.
const PLATFORM: [&str; 14] = [
    "fw_cfg_io",
    "hpet",
    "i8042",
    "i8257",
    "ioapic",
    "isa-i8259",
    "isa-pcspk",
    "isa-pit",
    "kvmvapic",
    "mc146818rtc",
    "port92",
    "ps2-kbd",
    "ps2-mouse",
    "vmgenid",
];
/// A chipset.
const Q35: [&str; 3] = ["ICH9-LPC", "mch", "q35-pcihost"];
/// The older one, whose disk and floppy controllers cannot be left out.
const PC: [&str; 7] =
    ["PIIX3", "PIIX4_PM", "i440FX", "i440FX-pcihost", "isa-fdc", "piix3-ide", "smbus-eeprom"];
/// Console, ports of the agent, random numbers, and a bridge for what is plugged later.
const OWN: [&str; 6] = [
    "pci-bridge",
    "virtconsole",
    "virtio-rng-device",
    "virtio-rng-pci",
    "virtio-serial-device",
    "virtio-serial-pci",
];
const PORTS: [&str; 1] = ["virtserialport"];
/// On which Kata's clients plug disks.
const SCSI: [&str; 2] = ["virtio-scsi-device", "virtio-scsi-pci"];

fn devices(options: &Options) -> (BTreeSet<String>, BTreeSet<String>) {
    let daemon = Daemon::launch(options, Dir::new());
    daemon.wait_rest(options.pool);
    let vm = directories(&daemon.store()).remove(0);
    let mut qmp = Qmp::connect(&vm.join("qmp.sock"), QUICK).unwrap();
    let ask = json!({"command-line": "info qtree"});
    let tree = qmp.execute("human-monitor-command", Some(ask), QUICK).unwrap();
    let names = tree.as_str().unwrap().lines().filter_map(|line| {
        let name = line.trim_start().strip_prefix("dev: ")?.split(',').next()?;
        Some(name.to_string())
    });
    let buses = qmp.execute("query-pci", None, QUICK).unwrap();
    let pci = buses.as_array().unwrap().iter().flat_map(|bus| bus["devices"].as_array().unwrap());
    let hex = |v: &Value| format!("{:04x}", v.as_u64().unwrap());
    let pci = pci.map(|d| format!("{}:{}", hex(&d["id"]["vendor"]), hex(&d["id"]["device"])));
    let found = (names.collect(), pci.collect());
    drop(qmp);
    drop(daemon.quit());
    found
}

fn expect(what: &str, options: &Options, lists: &[&[&str]], pci: &[&str]) {
    let (tree, on_bus) = devices(options);
    let listed: BTreeSet<String> =
        lists.iter().flat_map(|l| l.iter().map(|d| d.to_string())).collect();
    let beyond: Vec<_> = tree.difference(&listed).collect();
    assert!(beyond.is_empty(), "{what}: {beyond:?} is there for no reason");
    // vmgenid is no device of the tree's in each version.
    let missing: Vec<_> = listed.difference(&tree).filter(|d| *d != "vmgenid").collect();
    assert!(missing.is_empty(), "{what}: {missing:?} is listed, and not there");
    let listed: BTreeSet<String> = pci.iter().map(|d| d.to_string()).collect();
    assert_eq!(on_bus, listed, "{what}");
}

fn bare(prepared: &Path) -> Options {
    let mut options = Options::pool(prepared, 1);
    options.more_ours += "agent = \"noop\"\n";
    options
}

/// Of the q35: its host bridge and ISA bridge; the PCI bridge, serial ports, random numbers.
const Q35_PCI: [&str; 5] = ["8086:29c0", "8086:2918", "1b36:0001", "1af4:1003", "1af4:1005"];
const SCSI_PCI: &str = "1af4:1004";

#[test]
fn a_vm_has_the_devices_that_its_configuration_needs_and_no_others() {
    let prepared = require_qemu!();
    let with_scsi = [&Q35_PCI[..], &[SCSI_PCI]].concat();
    let q35: [&[&str]; 4] = [&PLATFORM, &Q35, &OWN, &SCSI];
    let all = [&q35[..], &[&PORTS]].concat();
    expect("as it is", &Options::pool(&prepared, 1), &all, &with_scsi);
    expect("without an agent", &bare(&prepared), &q35, &with_scsi);

    let mut ours = bare(&prepared);
    ours.more_ours += "kata_calls = false\n";
    expect("for our clients only", &ours, &[&PLATFORM, &Q35, &OWN], &Q35_PCI);

    let mut pc = ours;
    pc.more_qemu = "machine_type = \"pc\"\n".into();
    let bus = ["8086:1237", "8086:7000", "8086:7010", "8086:7113"];
    expect("pc", &pc, &[&PLATFORM, &PC, &OWN], &[&bus[..], &Q35_PCI[2..]].concat());

    let mut balloon = bare(&prepared);
    balloon.more_qemu =
        "reclaim_guest_freed_memory = true\nblock_device_driver = \"virtio-blk\"\n".into();
    let more: &[&str] = &["virtio-balloon-device", "virtio-balloon-pci"];
    let bus = [&Q35_PCI[..], &["1af4:1002"]].concat();
    // Nobody in a bare guest answers it.
    balloon.more_ours = balloon.more_ours.replace("agent = \"noop\"\n", "");
    expect("balloon", &balloon, &[&PLATFORM, &Q35, &OWN, &PORTS, more], &bus);

    let mut files = bare(&prepared);
    files.more_qemu = "shared_fs = \"virtio-9p\"\n".into();
    let more: &[&str] = &["virtio-9p-device", "virtio-9p-pci"];
    let bus = [&with_scsi[..], &["1af4:1009"]].concat();
    expect("9p", &files, &[&PLATFORM, &Q35, &OWN, &SCSI, more], &bus);

    let mut vsock = Options::pool(&prepared, 1);
    vsock.more_ours += &vsock_device(&prepared);
    let more: &[&str] = &["vhost-user-vsock-device", "vhost-user-vsock-pci"];
    let bus = [&with_scsi[..], &["1af4:1053"]].concat();
    expect("vsock in user space", &vsock, &[&all[..], &[more]].concat(), &bus);
}
