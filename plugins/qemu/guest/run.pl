# What the guest is there for: the command in dormouse.run on the kernel's command line, else the server beside this file.
# It is base64 of JSON, { argv, env, cwd }. The command has the console, and its end is that of the guest; the exit code
# goes to the port dormouse.exit.
use strict;
use warnings;

my $TCSBRK = 0x5409; # ioctl_tty(2): with 1, waits until all has been written

sub slurp {
    open(my $file, "<", $_[0]) or return "";
    local $/;
    return scalar <$file>;
}

# JSON as JSON.stringify writes it, without numbers: there are no modules here.
sub value {
    my ($text) = @_;
    if ($$text =~ /\G"((?:[^"\\]|\\.)*)"/gc) {
        my $string = $1;
        my %short = (b => "\b", f => "\f", n => "\n", r => "\r", t => "\t");
        $string =~ s/\\(?:u([0-9a-f]{4})|(.))/defined $1 ? chr hex $1 : $short{$2} \/\/ $2/gei;
        return $string;
    }
    if ($$text =~ /\G\[/gc) {
        my @list;
        until ($$text =~ /\G\]/gc) { push @list, value($text); $$text =~ /\G,/gc }
        return \@list;
    }
    $$text =~ /\G\{/gc or die "dormouse.run is not understood\n";
    my %object;
    until ($$text =~ /\G\}/gc) {
        my $name = value($text);
        $$text =~ /\G:/gc;
        $object{$name} = value($text);
        $$text =~ /\G,/gc;
    }
    return \%object;
}

my ($run) = slurp("/proc/cmdline") =~ /(?:^| )dormouse\.run=(\S+)/;
if (!defined $run) { exec "/usr/bin/perl", "/srv/server.pl" or die "exec: $!" }

$run =~ tr{A-Za-z0-9+/}{}cd;
$run =~ tr{A-Za-z0-9+/}{ -_};
my $json = join "", map { unpack "u", chr(32 + int(length($_) * 3 / 4)) . $_ } $run =~ /(.{1,60})/g;
my $work = value(\$json);

my $pid = fork;
if (defined $pid && $pid == 0) {
    open(STDIN, "<", "/dev/null");
    open(STDOUT, ">>", "/dev/console");
    open(STDERR, ">&", \*STDOUT);
    chdir($work->{cwd} // "/") or do { print STDERR "cannot enter $work->{cwd}: $!\n"; exit 126 };
    %ENV = (PATH => "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", HOME => "/", %{ $work->{env} });
    exec { $work->{argv}[0] } @{ $work->{argv} } or print STDERR "cannot run $work->{argv}[0]: $!\n";
    exit 127;
}
waitpid $pid, 0;
my $code = $? & 127 ? 128 + ($? & 127) : $? >> 8;

if (open(my $console, ">>", "/dev/console")) { ioctl($console, $TCSBRK, 1) }
my $there = opendir(my $ports, "/sys/class/virtio-ports");
for my $device ($there ? readdir $ports : ()) {
    next unless slurp("/sys/class/virtio-ports/$device/name") eq "dormouse.exit\n";
    open(my $port, ">", "/dev/$device") or last;
    syswrite $port, "$code\n";
    close $port;
}
exec "/sbin/shutdown", "-h";
