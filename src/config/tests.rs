//! What a wrong configuration says, and what a right one means.

use super::*;

fn parse(text: &str) -> Result<Config, Error> {
    Config::parse(Path::new("/etc/c.toml"), text)
}

fn refused(text: &str) -> String {
    parse(text).expect_err(text).to_string()
}

#[test]
fn defaults_hold_and_katas_own_files_are_read() {
    let c = parse("").unwrap();
    assert_eq!((c.pool, c.cpus(), c.memory()), (0, 1, 2048));
    assert_eq!(c.endpoint(), Path::new("/var/run/kata-containers/cache.sock"));
    for file in ["kata-1.13", "kata-3.20"] {
        // Relative: cargo runs tests in the package's root, and a target directory shared by
        // several checkouts must not carry another one's path.
        let path = format!("tests/fixtures/{file}/configuration.toml");
        // Whoever's the checkout is.
        let c = Config::parse(Path::new(&path), &std::fs::read_to_string(&path).unwrap()).unwrap();
        assert!(c.pool >= 2, "{file}");
        let unknown: Vec<_> = c.warnings.iter().filter(|w| w.contains("not known")).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
    }
}

#[test]
fn errors_name_file_line_key_value_and_remedy() {
    let e = refused("[hypervisor.qemu]\ndefault_memory = 8\n");
    assert!(e.contains("/etc/c.toml:2") && e.contains("default_memory = 8"), "{e}");
    assert!(e.contains("at least 64 MiB"), "{e}");
    let e = refused("[vmcache]\n\naccell = \"tcg\"\n");
    assert!(e.contains("/etc/c.toml:3: vmcache.accell is not an option"), "{e}");
    let e = refused("[hypervisor.qemu]\ndefault_vcpus = \"two\"\n");
    assert!(e.contains("default_vcpus is the string \"two\", but must be a whole number"), "{e}");
    let e = refused("[vmcache\n");
    assert!(e.contains("/etc/c.toml:1: not valid TOML"), "{e}");
    let long = format!("[factory]\nvm_cache_endpoint = \"/{}\"\n", "x".repeat(199));
    assert!(refused(&long).contains("200 bytes, but the path of a socket can have 107"));
    for (text, word) in [
        ("[vmcache]\naccel = \"xen\"\n", "\"kvm\" or \"tcg\""),
        ("[vmcache]\ntransport = \"pigeon\"\n", "serial"),
        ("[vmcache]\nagent = \"pigeon\"\n", "Unknown agent type pigeon; there are noop, kata"),
        (
            "[vmcache]\nagent = \"noop\"\n[factory]\nenable_template = true\n",
            "agent = \"noop\": can not be used with templates",
        ),
        ("[agent.kata]\nprotocol = \"grpcs\"\n", "\"ttrpc\" or \"grpc\""),
        ("[agent.kata]\nprotocol = \"grpc\"\n[vmcache]\nagent = \"noop\"\n", "is for agent"),
        (
            "[vmcache]\ntransport = \"vhost-user-vsock\"\n[factory]\nenable_template = true\n",
            "can not be \"vhost-user-vsock\" with templates",
        ),
        ("[vmcache]\ntransport = \"vsock\"\nagent = \"hyperstart\"\n", "for hyperstart"),
        ("[vmcache]\nvsock_sockets = \"/a\"\n", "two absolute paths"),
        ("[vmcache]\nvsock_sockets = \"/a,/b\"\n[factory]\nvm_cache_number = 2\n", "one VM"),
        ("[vmcache]\nwire = \"kata-9\"\n", "\"kata-1\" or \"kata-3\""),
        ("[vmcache]\nboot_timeout = 0\n", "1 to 3600"),
        ("[vmcache]\nsocket_mode = \"rw\"\n", "octal"),
        ("[vmcache]\nlog_level = \"loud\"\n", "debug"),
        ("[vmcache]\nvm_store_path = \"run\"\n", "absolute"),
        ("[hypervisor.qemu]\nmachine_type = \"isapc\"\n", "q35"),
        (
            "[hypervisor.qemu]\nenable_hugepages = true\n[factory]\nenable_template = true\n",
            "enable_template",
        ),
        ("[factory]\ntemplate_path = \"t\"\nenable_template = true\n", "absolute"),
        ("[factory]\nvm_cache_number = 100000\n", "at most 4096"),
    ] {
        let e = refused(text);
        assert!(e.contains(word) && e.contains("/etc/c.toml:2"), "{e}");
    }
}

#[test]
fn an_unknown_key_in_katas_table_is_a_warning() {
    let c = parse("[hypervisor.qemu]\nnew_thing = 1\n").unwrap();
    assert_eq!(c.warnings.len(), 1);
    assert!(c.warnings[0].contains("/etc/c.toml:2"));
    let c = parse(
        "[hypervisor.qemu]\nreclaim_guest_freed_memory = true\n[factory]\nenable_template = true\n",
    );
    assert!(c.unwrap().warnings[0].contains("/etc/c.toml:2: reclaim_guest_freed_memory has no"));
}

#[test]
fn drop_ins_come_after_the_file_in_order() {
    let dir = std::env::temp_dir().join(format!("vmcache-config-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("conf.d")).unwrap();
    let file = dir.join("configuration.toml");
    std::fs::write(&file, "[factory]\nvm_cache_number = 1\n").unwrap();
    std::fs::write(dir.join("conf.d/20.toml"), "[factory]\nvm_cache_number = 3\n").unwrap();
    std::fs::write(dir.join("conf.d/10.toml"), "[factory]\nvm_cache_number = 2\n").unwrap();
    let c = Config::read(&file).unwrap();
    assert_eq!((c.pool, c.files.len()), (3, 3));
    assert!(c.place(FACTORY, "vm_cache_number").file.ends_with("20.toml"));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn what_is_shown_can_be_read_back() {
    let c = parse("[vmcache]\naccel = \"tcg\"\nboot_timeout = 7\n").unwrap();
    let again = parse(&show(&c)).unwrap();
    assert_eq!((again.accel, again.boot_timeout), (Accel::Tcg, Duration::from_secs(7)));
    assert!(show(&c).contains("accel = \"tcg\"  # /etc/c.toml:2"));
}

#[test]
fn a_cold_vm_may_have_another_size() {
    let c = parse("[hypervisor.qemu]\ndefault_maxvcpus = 4\n").unwrap();
    let big = c.resized(Some(3), Some(700)).unwrap();
    assert_eq!((big.cpus(), big.memory()), (3, 700));
    let e = c.resized(Some(9), None).unwrap_err().to_string();
    assert!(e.contains("command line") && e.contains("1 to default_maxvcpus"), "{e}");
}
