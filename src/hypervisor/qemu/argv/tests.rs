//! Command lines, as snapshots, and beside one of Kata's.

use super::*;

fn line(text: &str) -> String {
    line_with(text, &[Channel::Vsock { cid: 4_252_714_826 }])
}

fn line_with(text: &str, more: &[Channel]) -> String {
    let config = Config::parse(Path::new("c.toml"), text).unwrap();
    let dir = Path::new("/run/vc/vm/ID");
    let ports = (0..AGENT_PORTS).map(|i| Channel::Port {
        name: format!("agent.channel.{i}"),
        socket: dir.join(format!("agent.{i}.sock")),
    });
    let channels: Vec<Channel> = ports.chain(more.iter().cloned()).collect();
    let names = Names {
        id: "ID",
        uuid: "UUID",
        dir,
        passed: Passed {
            monitor: 9,
            console: 10,
            ports: vec![11, 12, 13, 14],
            kernel: None,
            initrd: Some(15),
            vsock: Some(4),
            share: None,
        },
        host_memory: 4096,
        memory: Memory::Own,
        channels: &channels,
    };
    let args: Vec<String> =
        argv(&config, &names).into_iter().map(|a| a.into_string().unwrap()).collect();
    args.join(" ")
}

const BASE: &str = "[hypervisor.qemu]\nkernel = \"K\"\ninitrd = \"I\"\ndefault_memory = 256\n\
                    default_maxvcpus = 2\n";

#[test]
fn a_kvm_q35_vm_has_katas_devices() {
    let expected = "-name sandbox-ID,debug-threads=on -uuid UUID -machine q35,accel=kvm,\
        dump-guest-core=off,vmport=off,sata=off,smbus=off \
        -cpu host,vmx=off,svm=off -chardev socket,id=charqmp,fd=9,server=on,wait=off \
        -mon chardev=charqmp,mode=control -m 256M,slots=10,maxmem=4096M \
        -device pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2,\
        io-reserve=4k,mem-reserve=1m,pref64-reserve=1m -device virtio-serial-pci,id=serial0 \
        -device virtconsole,chardev=charconsole0,id=console0 \
        -chardev socket,id=charconsole0,fd=10,server=on,wait=off";
    let got = line(BASE);
    assert!(got.starts_with(expected), "{got}");
    let end = "-vga none -no-user-config -nodefaults -nographic --no-reboot \
        -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
        -object memory-backend-ram,id=dimm1,size=256M -numa node,memdev=dimm1 -kernel K \
        -initrd /proc/self/fd/15 -append";
    assert!(got.contains(end), "{got}");
    assert!(got.ends_with("-smp 1,cores=1,threads=1,sockets=2,maxcpus=2"), "{got}");
    let vsock = "-device vhost-vsock-pci,vhostfd=4,id=vsock-4252714826,guest-cid=4252714826 ";
    assert!(got.contains(vsock), "{got}");
    assert!(got.contains("name=agent.channel.3") && !got.contains("agent.channel.4"));
}

#[test]
fn vsock_in_user_space_has_a_socket_and_shared_memory() {
    let socket = "/run/vc/vm/ID/vsock/vhost.sock".into();
    let got = line_with(
        &format!("{BASE}[vmcache]\ntransport = \"vhost-user-vsock\"\n"),
        &[Channel::VhostUserVsock { socket }],
    );
    for part in [
        "-chardev socket,id=charvsock0,fd=4 \
         -device vhost-user-vsock-pci,chardev=charvsock0,id=vsock0",
        "-object memory-backend-memfd,id=dimm1,size=256M,share=on",
    ] {
        assert!(got.contains(part), "{part} in {got}");
    }
}

#[test]
fn options_find_their_place() {
    let got = line(
        "[hypervisor.qemu]\nmachine_type = \"pc\"\ncpu_features = \"pmu=off\"\n\
         kernel_params = \"a=b\"\nblock_device_driver = \"virtio-blk\"\n\
         machine_accelerators = \"nvdimm=off\"\nenable_hugepages = true\n\
         enable_debug = true\nreclaim_guest_freed_memory = true\n[vmcache]\naccel = \"tcg\"\nsandbox = false\n",
    );
    for part in [
        "-machine pc,accel=tcg,dump-guest-core=off,vmport=off,nvdimm=off \
         -cpu max,pmu=off,vmx=off,svm=off,min-xlevel=0x8000000a -",
        "pci-bridge,bus=pci.0,id=pci-bridge-0,chassis_nr=1,shpc=on,addr=2",
        "memory-backend-file,id=dimm1,size=2048M,mem-path=/dev/hugepages,share=on,prealloc=on",
        " debug panic=1 ",
        "-device virtio-balloon-pci,id=balloon0,free-page-reporting=on,deflate-on-oom=on",
        " a=b -smp",
    ] {
        assert!(got.contains(part), "{part} in {got}");
    }
    assert!(!line(BASE).contains("balloon"));
    let nested = line(&format!("{BASE}[vmcache]\nnested = true\nkata_calls = false\n"));
    assert!(nested.contains(" -cpu host -") && !nested.contains("scsi"), "{nested}");
    for part in ["-sandbox", "scsi", "kvm-pit", "quiet"] {
        assert!(!got.contains(part), "no {part} in {got}");
    }
}

#[test]
fn a_comma_in_a_path_is_no_separator() {
    assert_eq!(escaped(Path::new("/a,b")), "/a,,b");
}

/// Where our command line is another than that of a VM of Kata 1.13's made from the
/// same file, by how the piece begins, and why. What only this host decides is left
/// out of the comparison.
const OTHERWISE: [(&str, &str); 9] = [
    ("-cpu", "the capture's wrapper took pmu=off out"),
    ("-qmp", "a listener that is inherited, so that nobody waits for it to appear"),
    ("-chardev socket", "the same, for all sockets: QEMU makes none"),
    ("-mon", "the same"),
    ("-daemonize", "its parent holds a pidfd, and reads what it says when it dies"),
    ("-pidfile", "written by the server, before QEMU could"),
    ("-device vmgenid", "a generation id, by which a clone's guest sees that it is one"),
    ("-sandbox", "a seccomp filter"),
    ("-append", "compared word by word"),
];

/// What is in one of both only, within a piece.
const WITHIN: [(&str, &str); 6] = [
    (",dump-guest-core=off", "a guest's memory is in no core file"),
    (",vmport=off", "a device that no feature uses"),
    (",romfile=", "boot ROMs: guests are booted by -kernel"),
    (",disable-modern=true", "Kata takes old virtio in a VM of a VM"),
    (",max_ports=2", "no limit on ports is needed"),
    (",debug-threads=on", "threads have names, as Kata 3.x gives them"),
];

/// Both in pieces that can be compared: an option with its value, or alone.
fn pieces(args: &[String]) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for arg in args {
        match (arg.starts_with('-'), out.last_mut()) {
            (false, Some(last)) => last.push_str(&format!(" {arg}")),
            _ => out.push(arg.clone()),
        }
    }
    let plain = |p: &String| {
        // Two spellings of one thing.
        let p = p.replace(",server=on,wait=off", ",server,nowait");
        WITHIN.iter().fold(p, |p, (taken, _)| p.replace(taken, ""))
    };
    out.iter().map(plain).collect()
}

#[test]
fn a_vm_of_katas_file_is_katas_but_for_what_is_said() {
    let fixture = "tests/fixtures/kata-1.13";
    let theirs = std::fs::read_to_string(format!("{fixture}/vm.qemu-argv.txt")).unwrap();
    let theirs: Vec<String> = theirs.lines().skip(1).map(String::from).collect();
    let text = std::fs::read_to_string(format!("{fixture}/configuration.toml")).unwrap();
    let text = text.replace("[agent.kata]\n", "[agent.kata]\nprotocol = \"grpc\"\n")
        + "[vmcache]\naccel = \"tcg\"\n";
    let text = text.replace("default_maxvcpus = 0", "default_maxvcpus = 2");
    let config = Config::parse(Path::new("c.toml"), &text).unwrap();
    let id = "79ccfa2e-79b8-4553-8cba-06470cf1b31c";
    let dir = Path::new("/run/vc/vm").join(id);
    let seat = crate::agent::seat::Seat { dir: dir.clone(), way: crate::agent::seat::Way::Serial };
    let channels = crate::agent::new(config.agent_kind).configure(&seat).unwrap();
    let names = Names {
        id,
        uuid: "e5370c45-dead-4e0f-9b33-f9f56bab9c24",
        dir: &dir,
        passed: Passed { monitor: 9, console: 10, ports: vec![11], ..Passed::default() },
        host_memory: 25129,
        memory: Memory::Own,
        channels: &channels,
    };
    let ours: Vec<String> =
        argv(&config, &names).into_iter().map(|a| a.into_string().unwrap()).collect();
    let (ours, theirs) = (pieces(&ours), pieces(&theirs));
    let only = |a: &[String], b: &[String]| -> Vec<String> {
        a.iter().filter(|p| !b.contains(p)).cloned().collect()
    };
    let differ = [only(&theirs, &ours), only(&ours, &theirs)].concat();
    let unsaid: Vec<_> = differ
        .iter()
        .filter(|p| !OTHERWISE.iter().any(|(begins, _)| p.starts_with(begins)))
        .collect();
    assert_eq!(unsaid, Vec::<&String>::new());
    for (begins, why) in OTHERWISE {
        assert!(differ.iter().any(|p| p.starts_with(begins)), "{begins} is the same now: {why}");
    }
    // Kernel parameters: all of Kata's but one.
    let append = |all: &[String]| -> Vec<String> {
        let line = all.iter().find(|p| p.starts_with("-append ")).unwrap();
        line["-append ".len()..].split(' ').map(String::from).collect()
    };
    let (ours, theirs) = (append(&ours), append(&theirs));
    let missing: Vec<_> = theirs.iter().filter(|w| !ours.contains(w)).collect();
    // No IOMMU is offered; and which transport an agent listens on, it finds out.
    assert_eq!(missing, ["iommu=off", "iommu=off"]);
    let more: Vec<_> = ours.iter().filter(|w| !theirs.contains(w)).collect();
    assert_eq!(more, ["memory_hotplug.memmap_on_memory=1", "swiotlb=noforce"]);
}
