//! The other owner of a path: each path that a configuration or a command line names, and each
//! directory above it, is another user's, writable for others, a link into another user's
//! directory, or a FIFO. Whatever root's program does, it does nothing for that user; and with
//! the wall down it does.
//!
//! No guest is booted, but for the servers of an ordinary user: QEMU's place has a program that
//! leaves a mark.

mod place;

use std::fs;
use std::os::unix::fs::{chown, lchown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::daemon::{assert_nothing_left, text, Daemon, Dir, Options};
use crate::require_qemu;
use place::{chmod, Case, Place, Serving, Target, CASES, EVE, NO_PATHS, STAFF};

/// A component is spoilt in each way, and each command refuses with its name.
fn spoil(place: &Place, case: &Case, commands: &[&[&str]]) {
    let target = place.path(case.target);
    let components: Vec<_> =
        target.ancestors().take_while(|p| p.starts_with(&place.dir.0)).collect();
    let before = place.picture();
    let refused = |component: &Path, words: &str| {
        for command in commands {
            let (code, said) = place.run(command);
            let told = said.contains(&format!("{} ", component.display())) && said.contains(words);
            assert!(code != Some(0) && told, "{}: {command:?}, {words}: {said}", case.name);
        }
    };
    for component in components {
        let last = component == target;
        // Whose a socket is, and who may connect to it, is its server's to say.
        let own = !(last && case.kind == Target::Socket);
        let mode = place::mode(component);
        if own {
            chown(component, Some(EVE), None).unwrap();
            refused(component, &format!("is uid {EVE}'s (mode "));
            chown(component, Some(0), None).unwrap();
            chmod(component, mode | 0o002);
            refused(component, "is writable for everybody");
            chmod(component, mode | 0o020);
            chown(component, None, Some(STAFF)).unwrap();
            refused(component, "is writable for group");
            chown(component, None, Some(0)).unwrap();
            chmod(component, mode);
        }
        if component != place.dir.0 {
            // Root's own link, into what is another's.
            let moved = place.path("eves/moved");
            fs::rename(component, &moved).unwrap();
            symlink(&moved, component).unwrap();
            refused(&place.path("eves"), &format!("is uid {EVE}'s"));
            fs::remove_file(component).unwrap();
            fs::rename(&moved, component).unwrap();
        }
        if last && case.kind == Target::File {
            let aside = place.path("aside");
            fs::rename(component, &aside).unwrap();
            mkfifo(component, Mode::S_IRWXU).unwrap();
            refused(component, "is a FIFO");
            fs::remove_file(component).unwrap();
            fs::rename(&aside, component).unwrap();
        }
    }
    assert_eq!(place.picture(), before, "{}: something has changed", case.name);
    place.assert_unmarked();
}

/// The table: each option that names a path.
#[test]
fn every_path_of_a_configuration_and_what_is_above_it_is_refused_by_name() {
    let place = Place::new();
    for case in CASES {
        place.configure(case);
        let (code, said) = place.run(&["config", "check"]);
        assert_eq!(code, Some(0), "{}: {said}", case.name);
        let start: &[&str] = &["serve", "--log", "stderr"];
        spoil(&place, case, &[&["config", "check"], start]);
    }
}

/// An option that is added is one of a path, which is tried above, or none.
#[test]
fn every_option_of_text_is_known_here() {
    use vmcache::config::options::{Fallback, OPTIONS};
    for option in &OPTIONS {
        let name = format!("{}.{}", option.table, option.key);
        let text = matches!(option.default, Fallback::Text(_) | Fallback::List(_));
        let tried = CASES.iter().filter(|c| c.name == name).count();
        let none = NO_PATHS.iter().filter(|n| **n == name).count();
        assert_eq!(tried + none, usize::from(text), "does {name} name a path?");
    }
}

/// What is not there when it is looked at can be there when it is used: of others' making, where
/// they may make it.
#[test]
fn what_others_could_still_make_is_refused() {
    let place = Place::new();
    let shared = place.path("shared");
    fs::create_dir(&shared).unwrap();
    chmod(&shared, 0o1777);
    let missing = shared.join("later");
    let words = format!("{} is not there, and others may make entries", missing.display());
    for case in [
        Case::NONE.with_ours("confine_paths = [\"@/shared/later\"]\n".into()),
        Case::NONE.with_ours("log = \"unix:@/shared/later\"\n".into()),
        Case { qemu: "entropy_source = \"@/shared/later\"\n", ..Case::NONE },
        Case { qemu: "file_mem_backend = \"@/shared/later\"\n", ..Case::NONE },
    ] {
        place.configure(&case);
        for command in [&["config", "check"][..], &["serve", "--log", "stderr"]] {
            let (code, said) = place.run(command);
            assert!(code == Some(5) && said.contains(&words), "{code:?}: {said}");
        }
    }
    // A server makes these itself, and looks again.
    place.configure(&Case {
        factory: "enable_template = true\ntemplate_path = \"@/shared/later\"\n",
        ..Case::NONE
    });
    assert_eq!(place.run(&["config", "check"]).0, Some(0));
    symlink("/etc", &missing).unwrap();
    lchown(&missing, Some(EVE), None).unwrap();
    let (_, said) = place.run(&["config", "check"]);
    assert!(said.contains(&format!("{} is uid {EVE}'s", missing.display())), "{said}");
}

/// What is read before anything else: by servers and by whoever only asks them.
#[test]
fn every_command_refuses_a_configuration_that_is_another_users() {
    let place = Place::new();
    for (name, target) in [("configuration", "etc/c.toml"), ("drop-in", "etc/conf.d/10.toml")] {
        let case = Case { name, target, ..Case::NONE };
        let commands: [&[&str]; 6] = [
            &["config", "check"],
            &["serve", "--log", "stderr"],
            &["status"],
            &["list"],
            &["run", "--", "true"],
            &["doctor", "--no-boot"],
        ];
        spoil(&place, &case, &commands);
    }
    // What is said by whom to a client: the server's socket is enough.
    chown(place.path("etc/c.toml"), Some(EVE), None).unwrap();
    let (_, said) = place.run(&["status"]);
    assert!(said.contains("`--endpoint SOCKET` no configuration is needed"), "{said}");
    let (code, said) = place.run(&["status", "--endpoint", "/nonexistent/s"]);
    assert!(code == Some(3) && said.contains("/nonexistent/s"), "{code:?}: {said}");
}

/// A cgroup that was given to another user, below which VMs were to have theirs.
#[test]
fn a_cgroup_of_another_user_is_refused() {
    let place = Place::new();
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut mounts = table.lines().filter(|l| {
        let words: Vec<_> = l.split(' ').collect();
        words[2] == "cgroup2" || words[2] == "cgroup" && words[3].split(',').any(|o| o == "memory")
    });
    // As the server chooses: of version 1, if memory is limited there.
    let line = mounts.clone().find(|l| l.contains(" cgroup ")).or_else(|| mounts.next()).unwrap();
    let name = place.dir.0.file_name().unwrap().to_str().unwrap();
    let group = Path::new(line.split(' ').nth(1).unwrap()).join(name);
    fs::create_dir(&group).unwrap();
    place.configure(&Case::NONE.with_ours(format!("cgroup = \"{name}/below\"\n")));
    let check = || place.run(&["config", "check"]);
    let own = check();
    chown(&group, Some(EVE), None).unwrap();
    let eves = check();
    fs::remove_dir(&group).unwrap();
    assert_eq!(own.0, Some(0), "{}", own.1);
    let words = format!("{} is uid {EVE}'s", group.display());
    assert!(eves.0 == Some(5) && eves.1.contains(&words), "{}", eves.1);
}

/// A symbolic link in the lock's place has root empty root's own file.
#[test]
fn a_lock_that_is_a_link_empties_nobodys_file() {
    let place = Place::new();
    let witness = place.witness();
    let lock = place.path("run/s.lock");
    let serve: &[&str] = &["serve", "--log", "stderr"];
    let refused = |component: &str, words: &str| {
        for command in [&["config", "check"], serve] {
            let (code, said) = place.run(command);
            let named = said.contains(&format!("{} ", place.path(component).display()));
            assert!(code != Some(0) && named && said.contains(words), "{words}: {said}");
        }
        assert_eq!(place.read_witness(), "root's");
    };
    symlink(&witness, &lock).unwrap();
    refused("run/s.lock", "is a symbolic link");
    // It is the kernel that stops this one, where fs.protected_symlinks is set; not here.
    chown(place.path("run"), Some(EVE), None).unwrap();
    lchown(&lock, Some(EVE), None).unwrap();
    refused("run", &format!("is uid {EVE}'s"));
    let server = Serving::unwalled(&place);
    assert_eq!(place.read_witness(), format!("{}\n", server.pid()), "the attack did nothing");
    server.stop();

    fs::write(&witness, "root's").unwrap();
    chown(place.path("run"), Some(0), None).unwrap();
    let _ = fs::remove_file(&lock);
    fs::hard_link(&witness, &lock).unwrap();
    refused("run/s.lock", "is a file with 2 names");
    fs::remove_file(&lock).unwrap();
    mkfifo(&lock, Mode::S_IRWXU).unwrap();
    refused("run/s.lock", "is a FIFO");
    fs::remove_file(&lock).unwrap();
    fs::write(&lock, "1\n").unwrap();
    chown(&lock, Some(EVE), None).unwrap();
    refused("run/s.lock", &format!("is uid {EVE}'s"));
    fs::remove_file(&lock).unwrap();
    // The socket itself, and its name before it is whole.
    for name in ["run/s", "run/s.n"] {
        fs::write(place.path(name), "eve's").unwrap();
        chown(place.path(name), Some(EVE), None).unwrap();
        refused(name, &format!("is uid {EVE}'s"));
        assert_eq!(fs::read_to_string(place.path(name)).unwrap(), "eve's");
        fs::remove_file(place.path(name)).unwrap();
    }
    symlink(&witness, place.path("run/s")).unwrap();
    refused("run/s", "is a symbolic link");
}

/// A drop-in of another user's names a program, which root then executes.
#[test]
fn a_drop_in_of_another_user_has_root_execute_nothing() {
    let place = Place::new();
    let program = place.program("eves/program", "eve");
    chown(&program, Some(EVE), None).unwrap();
    fs::write(place.path("etc/conf.d/99.toml"), format!("[hypervisor.qemu]\npath = {program:?}\n"))
        .unwrap();
    chown(place.path("etc/conf.d"), Some(EVE), None).unwrap();
    let doctor: &[&str] = &["doctor", "--no-boot"];
    let (code, said) = place.run(doctor);
    let words = format!("{} is uid {EVE}'s", place.path("etc/conf.d").display());
    assert!(code != Some(0) && said.contains(&words), "{said}");
    place.assert_unmarked();
    // Nor when root itself has put it there.
    chown(place.path("etc/conf.d"), Some(0), None).unwrap();
    let (_, said) = place.run(doctor);
    assert!(said.contains(&format!("{} is uid {EVE}'s", place.path("eves").display())), "{said}");
    place.assert_unmarked();
    chown(place.path("etc/conf.d"), Some(EVE), None).unwrap();
    place.run_unwalled(doctor);
    assert_eq!(fs::read_to_string(place.path("marks/eve")).unwrap(), "uid 0\n", "no attack");
}

/// The name under which a file was written before it was whole could be foreseen.
#[test]
fn a_file_that_is_written_is_written_through_no_link() {
    let place = Place::new();
    let witness = place.witness();
    let output = place.path("eves/m.prom");
    let write: Vec<&str> = vec!["status", "--openmetrics", "--output", output.to_str().unwrap()];
    symlink(&witness, place.path("eves/m.prom.new")).unwrap();
    let (code, said) = place.run(&write);
    let words = format!("{} is uid {EVE}'s", place.path("eves").display());
    assert!(code == Some(1) && said.contains(&words), "{said}");
    assert_eq!(place.read_witness(), "root's");
    place.run_unwalled(&write);
    assert!(place.read_witness().contains("vmcache_up 0"), "the attack did nothing");

    // In one's own directory, and in one that all share: what is there decides.
    fs::write(&witness, "root's").unwrap();
    let own = place.path("m.prom");
    let shared = place.path("shared");
    fs::create_dir(&shared).unwrap();
    chmod(&shared, 0o1777);
    for file in [own, shared.join("m.prom")] {
        let write = ["status", "--openmetrics", "--output", file.to_str().unwrap()];
        let said = || fs::read_to_string(&file).unwrap();
        let refused = |words: &str| {
            let (code, said) = place.run(&write);
            let named = said.contains(&format!("{} {words}", file.display()));
            assert!(code == Some(1) && named, "{words}: {said}");
        };
        for _ in 0..2 {
            // No server: exit code 3, and a file that says so.
            assert_eq!(place.run(&write).0, Some(3));
            assert!(said().contains("vmcache_up 0"), "{}", said());
        }
        fs::write(&file, "eve's").unwrap();
        chown(&file, Some(EVE), None).unwrap();
        refused(&format!("is uid {EVE}'s"));
        assert_eq!(said(), "eve's");
        fs::remove_file(&file).unwrap();
        symlink(&witness, &file).unwrap();
        refused("is a symbolic link");
        fs::remove_file(&file).unwrap();
        mkfifo(&file, Mode::S_IRWXU).unwrap();
        refused("is a FIFO");
    }
    assert_eq!(place.read_witness(), "root's");
}

/// Other files that commands write, and directories that they make: by name, before there is
/// anything to write.
#[test]
fn no_command_writes_into_another_users_directory() {
    let place = Place::new();
    let path = |name: &str| place.path(name).display().to_string();
    let (agent, modules) = (path("img/kernel"), path("img"));
    let before = place.picture();
    let words = format!("{} is uid {EVE}'s", path("eves"));
    for command in [
        vec!["generate".to_string(), path("eves/generated")],
        vec!["config".into(), "import".into(), "--from-endpoint".into(), "/nonexistent/s".into()]
            .into_iter()
            .chain(["--output".into(), path("eves/c.toml")])
            .collect(),
        vec!["mkinitrd".into(), "--agent".into(), agent.clone(), "--output".into()]
            .into_iter()
            .chain([path("eves/initrd"), "--kernel-modules".into(), modules.clone()])
            .collect(),
        vec!["guest".into(), "build".into(), "--agent".into(), agent.clone(), "--output".into()]
            .into_iter()
            .chain([path("eves/guest"), "--kernel".into(), path("img/kernel")])
            .chain(["--kernel-modules".into(), modules, "--userland".into(), path("bin/qemu")])
            .collect(),
    ] {
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let (code, said) = place.run(&command);
        assert!(code != Some(0) && said.contains(&words), "{command:?}: {said}");
    }
    // A namespace that never opens.
    let fifo = place.path("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let tap = format!("tap=vmct0,netns={}", fifo.display());
    let (code, said) = place.run(&["run", "--net", &tap, "--", "true"]);
    assert!(code == Some(2) && said.contains("is a FIFO"), "{code:?}: {said}");
    fs::remove_file(&fifo).unwrap();
    assert_eq!(place.picture(), before);
}

/// While a server looks through the store, its owner puts a link to root's tree in its place.
#[test]
fn a_store_that_is_swapped_has_nothing_of_roots_removed() {
    let place = Place::new();
    let (store, trees) = (place.path("state/vm"), place.path("trees"));
    let fill = || {
        let names: Vec<String> = (0..300).map(|n| format!("tree-{n}")).collect();
        for name in &names {
            fs::create_dir_all(store.join(name)).unwrap();
            fs::create_dir_all(trees.join(name)).unwrap();
            fs::write(trees.join(name).join("roots"), "").unwrap();
            // One of this endpoint's that a server before has left half made.
            fs::write(store.join(name).join("vm.json"), place.ledger(name)).unwrap();
            chown(store.join(name).join("vm.json"), Some(EVE), None).unwrap();
            chown(store.join(name), Some(EVE), None).unwrap();
        }
        chown(place.path("state"), Some(EVE), None).unwrap();
        chown(&store, Some(EVE), None).unwrap();
        names
    };
    let there = |names: &[String]| {
        names.iter().filter(|name| trees.join(name).join("roots").exists()).count()
    };
    let names = fill();
    let (code, said) = place.run(&["serve", "--log", "stderr"]);
    let words = format!("{} is uid {EVE}'s", place.path("state").display());
    assert!(code != Some(0) && said.contains(&words), "{said}");
    let (code, said) = place.run(&["list"]);
    assert!(code != Some(0) && said.contains(&words), "{said}");
    let (code, said) = place.run(&["stop", "tree-1"]);
    assert!(code != Some(0) && said.contains(&words), "{said}");
    assert_eq!(there(&names), names.len());

    let swapped = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            place::until("the first to go", || fs::read_dir(&store).unwrap().count() < names.len());
            fs::rename(&store, place.path("state/away")).unwrap();
            symlink(&trees, &store).unwrap();
            swapped.store(true, Ordering::SeqCst);
        });
        let server = Serving::unwalled(&place);
        assert!(swapped.load(Ordering::SeqCst));
        server.stop();
    });
    assert!(there(&names) < names.len(), "the attack did nothing");
}

/// A store that others share, as a tmpfs is where nobody says otherwise: what they put there is
/// neither a VM nor what a killed server left.
#[test]
fn what_others_put_into_a_shared_store_is_theirs() {
    let place = Place::new();
    let store = place.path("state/vm");
    chmod(&store, 0o1777);
    let names = ["tree-1", ".new-0-7-tree-2"];
    let there = || names.iter().filter(|name| store.join(name).join("eves").exists()).count();
    for name in names {
        fs::create_dir(store.join(name)).unwrap();
        fs::write(store.join(name).join("eves"), "").unwrap();
        fs::write(store.join(name).join("vm.json"), place.ledger(name)).unwrap();
        chown(store.join(name).join("vm.json"), Some(EVE), None).unwrap();
        chown(store.join(name), Some(EVE), None).unwrap();
    }
    Serving::start(&place, Path::new(env!("CARGO_BIN_EXE_vmcache")), &[]).stop();
    assert_eq!(there(), 2);
    let (code, said) = place.run(&["stop", "tree-1"]);
    assert!(code == Some(1) && said.contains("no VM"), "{said}");
    Serving::unwalled(&place).stop();
    assert_eq!(there(), 0, "the wall was not what kept them");
}

/// A template's lock, and what it is read from.
#[test]
fn a_templates_directory_is_root_s_or_is_none() {
    let place = Place::new();
    let witness = place.witness();
    place.configure(CASES.iter().find(|c| c.name == "factory.template_path").unwrap());
    let lock = place.path("mem/template/lock");
    symlink(&witness, &lock).unwrap();
    let destroy: &[&str] = &["template", "destroy"];
    let (code, said) = place.run(destroy);
    let words = format!("{} is a symbolic link", lock.display());
    assert!(code == Some(1) && said.contains(&words), "{said}");
    assert_eq!(place.read_witness(), "root's");
    chown(place.path("mem/template"), Some(EVE), None).unwrap();
    let words = format!("{} is uid {EVE}'s", place.path("mem/template").display());
    for command in [destroy, &["template", "create"], &["template", "status"]] {
        let (code, said) = place.run(command);
        assert!(code != Some(0) && said.contains(&words), "{command:?}: {said}");
    }
    assert_eq!(place.read_witness(), "root's");
    let (_, said) = place.run_unwalled(destroy);
    assert_ne!(place.read_witness(), "root's", "the attack did nothing: {said}");

    // A manifest that was there before the directory was closed.
    let _ = fs::remove_dir_all(place.path("mem/template"));
    fs::create_dir(place.path("mem/template")).unwrap();
    let manifest = place.path("mem/template/manifest.json");
    fs::write(&manifest, "{}").unwrap();
    chown(&manifest, Some(EVE), None).unwrap();
    let (code, said) = place.run(&["template", "status"]);
    let words = format!("{} is uid {EVE}'s", manifest.display());
    assert!(code != Some(0) && said.contains(&words), "{said}");
}

/// A server's own program, which a restart executes.
#[test]
fn a_restart_does_not_execute_what_another_user_can_replace() {
    let place = Place::new();
    let program = place.path("own/vmcache");
    fs::create_dir(place.path("own")).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_vmcache"), &program).unwrap();
    let server = Serving::start(&place, &program, &[]);
    chown(place.path("own"), Some(EVE), None).unwrap();
    let (code, said) = place.run(&["restart"]);
    let words = format!("{} is uid {EVE}'s", place.path("own").display());
    assert!(code == Some(1) && said.contains(&words), "{said}");
    chown(place.path("own"), Some(0), None).unwrap();
    let (code, said) = place.run(&["restart"]);
    assert_eq!(code, Some(0), "{said}");
    server.stop();
}

/// quickstart's directory in memory: one that is remembered is its user's own, or another is
/// made, of a name that nobody knows before.
#[test]
fn quickstarts_directory_is_not_another_users() {
    let place = Place::new();
    let script = fs::read_to_string("packaging/quickstart").unwrap();
    let lines = script.lines().skip_while(|l| !l.starts_with("run=$(cat"));
    let mut part: Vec<&str> = lines.take_while(|l| !l.starts_with("configure()")).collect();
    part.insert(0, "set -euo pipefail");
    part.push("echo \"$run\"");
    let run = || {
        let mut bash = Command::new("bash");
        bash.args(["-c", &part.join("\n")]).env("work", place.path("disks"));
        let out = bash.output().unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
        std::path::PathBuf::from(text(&out.stdout).trim())
    };
    let mine = run();
    assert_eq!(place::mode(&mine), 0o700);
    assert_eq!(run(), mine, "it is remembered");
    chown(&mine, Some(EVE), None).unwrap();
    let second = run();
    fs::remove_dir(&mine).unwrap();
    symlink(place.path("eves"), &mine).unwrap();
    let remember =
        |path: &Path| fs::write(place.path("disks/run"), path.to_str().unwrap()).unwrap();
    remember(&mine);
    let third = run();
    fs::remove_file(&mine).unwrap();
    remember(&place.path("eves"));
    let fourth = run();
    for other in [&second, &third, &fourth] {
        assert!(other.starts_with("/dev/shm") && *other != mine, "{}", other.display());
        fs::remove_dir(other).unwrap();
    }
}

/// Between check and use: now root's configuration, now another's.
#[test]
fn a_configuration_that_is_swapped_is_never_another_users() {
    let place = Place::new();
    let mine = fs::read_to_string(place.path("etc/c.toml")).unwrap();
    fs::create_dir(place.path("eves/etc")).unwrap();
    fs::write(place.path("eves/etc/c.toml"), format!("{mine}log_level = \"trace\"\n")).unwrap();
    for path in ["eves/etc/c.toml", "eves/etc"] {
        chown(place.path(path), Some(EVE), None).unwrap();
    }
    symlink(place.path("eves/etc"), place.path("link")).unwrap();
    let (etc, link, aside) = (place.path("etc"), place.path("link"), place.path("aside"));
    let stop = AtomicBool::new(false);
    let (mut read, mut refused, mut eves) = (0, 0, 0);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                fs::rename(&etc, &aside).unwrap();
                fs::rename(&link, &etc).unwrap();
                fs::rename(&etc, &link).unwrap();
                fs::rename(&aside, &etc).unwrap();
            }
        });
        for _ in 0..200 {
            match place.run(&["config", "show"]) {
                (Some(0), said) if said.contains("log_level = \"trace\"") => eves += 1,
                (Some(0), _) => read += 1,
                _ => refused += 1,
            }
        }
        place::until("the attack to do something", || {
            let (_, said) = place.run_unwalled(&["config", "show"]);
            said.contains("log_level = \"trace\"")
        });
        stop.store(true, Ordering::Relaxed);
    });
    assert!(eves == 0 && read > 0 && refused > 0, "{eves} of {read} read, {refused} refused");
}

/// Who is nobody in particular has a server of his own, root's files included; others and root
/// do not take what he says for theirs.
#[test]
fn an_ordinary_users_server_is_his_and_nobody_elses() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let mut options = Options::pool(&prepared, 1);
    let program = dir.0.join("vmcache");
    fs::copy(env!("CARGO_BIN_EXE_vmcache"), &program).unwrap();
    for (image, name) in [(&mut options.kernel, "kernel"), (&mut options.initrd, "initrd")] {
        let copy = dir.0.join(name);
        fs::copy(&image, &copy).unwrap();
        chmod(&copy, 0o644);
        *image = copy.display().to_string();
    }
    chown(&dir.0, Some(EVE), Some(EVE)).unwrap();
    options.server = Some((EVE, program.clone()));
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(1);
    // His files, root's files, and those of his that his own group may write.
    chown(&daemon.config, Some(EVE), Some(EVE)).unwrap();
    chmod(&daemon.config, 0o664);
    assert_eq!(daemon.ok(&["run", "--", "echo", "his"]), "his\n");
    daemon.ok(&["config", "check"]);
    // A file of his own, in his own directory, by a relative name.
    let mut status = daemon.command(&["status", "--openmetrics", "--output", "./m.prom"]);
    assert!(status.current_dir(&daemon.dir.0).status().unwrap().success());
    assert!(fs::read_to_string(daemon.dir.0.join("m.prom")).unwrap().contains("vmcache_up 1"));
    symlink("/nonexistent", daemon.dir.0.join("link")).unwrap();
    let mut status = daemon.command(&["status", "--openmetrics", "--output", "link"]);
    let out = status.current_dir(&daemon.dir.0).output().unwrap();
    assert!(text(&out.stderr).contains("is a symbolic link"), "{}", text(&out.stderr));

    let words = format!("{} is uid {EVE}'s", daemon.dir.0.display());
    let of = |uid: u32, args: &[&str], config: bool| {
        let mut c = Command::new(&program);
        c.env_clear().args(args).uid(uid).gid(uid);
        if config {
            c.env("VMCACHE_CONFIG", &daemon.config);
        }
        let out = c.output().unwrap();
        (out.status.code(), text(&out.stdout) + &text(&out.stderr))
    };
    let socket = daemon.socket();
    let endpoint = ["--endpoint", socket.to_str().unwrap()];
    for uid in [0, EVE + 1] {
        let (code, said) = of(uid, &["status"], true);
        assert!(code == Some(2) && said.contains(&words), "{said}");
        assert!(said.contains("--endpoint SOCKET"), "{said}");
    }
    // Root may ask him, and takes no VM of his for one of root's.
    daemon.wait_ready(1);
    let (code, said) = of(0, &[&["status"][..], &endpoint].concat(), false);
    assert!(code == Some(0) && said.contains("1 ready of 1"), "{said}");
    let (code, said) = of(0, &[&["get"][..], &endpoint].concat(), false);
    assert!(code != Some(0) && said.contains(&words), "{said}");
    daemon.wait_ready(1);
    assert_eq!(daemon.ok(&["run", "--", "echo", "his"]), "his\n");
    let dir = daemon.quit();
    assert_nothing_left(&dir.0);
}
