# HTTP on port 80 and an echo on port 7. One process serves all connections, so the count of requests is a variable in the
# guest's memory, and each request sees its own value of it. Only Perl's own functions: there are no modules here.
use strict;
use warnings;

# Linux on x86-64.
my ($AF_INET, $AF_INET6, $SOCK_STREAM, $SOL_SOCKET, $SO_REUSEADDR) = (2, 10, 1, 1, 2);
my ($F_SETFL, $O_NONBLOCK, $SYS_clock_gettime, $CLOCK_REALTIME) = (4, 2048, 228, 0);
my $EAGAIN = 11;
my $MAX_HEAD = 16384;

my $requests = 0;
my %listeners; # file number => [socket, handler]
my %clients;   # file number => { socket, handler, in, out, closing }

sub slurp {
    open(my $file, "<", $_[0]) or return undef;
    my $line = <$file>;
    chomp $line if defined $line;
    return $line;
}

sub listen_on {
    my ($port, $handler) = @_;
    my $v6 = -e "/proc/net/if_inet6";
    socket(my $socket, $v6 ? $AF_INET6 : $AF_INET, $SOCK_STREAM, 0) or die "socket: $!";
    setsockopt($socket, $SOL_SOCKET, $SO_REUSEADDR, 1);
    my $address = $v6 ? pack("S n N a16 N", $AF_INET6, $port, 0, "", 0) : pack("S n N x8", $AF_INET, $port, 0);
    bind($socket, $address) or die "bind: $!";
    listen($socket, 1024) or die "listen: $!";
    fcntl($socket, $F_SETFL, $O_NONBLOCK);
    $listeners{fileno $socket} = [$socket, $handler];
}

sub clock_ms {
    my $time = "\0" x 16;
    syscall($SYS_clock_gettime, $CLOCK_REALTIME, $time);
    my ($seconds, $nanoseconds) = unpack("q2", $time);
    return $seconds * 1000 + int($nanoseconds / 1_000_000);
}

sub report {
    my ($hostname, $boots) = (slurp("/proc/sys/kernel/hostname"), slurp("/data/boots"));
    my ($uptime) = split / /, slurp("/proc/uptime");
    $hostname =~ s/([\x00-\x1f"\\])/sprintf "\\u%04x", ord $1/ge;
    return sprintf "{\"hostname\":\"%s\",\"requests\":%d,\"uptime\":%s,\"clock\":%d,\"boots\":%s}\n",
        $hostname, ++$requests, $uptime, clock_ms(), $boots // "null";
}

sub http {
    my ($client) = @_;
    return if $client->{closing};
    my $too_long = length $client->{in} > $MAX_HEAD;
    return unless $too_long || $client->{in} =~ /\r?\n\r?\n/;
    my ($method, $path) = $client->{in} =~ m{^(\w+) (\S+) HTTP/1\.[01]\r?\n};
    my ($status, $body) = ("200 OK", "");
    if ($too_long || !defined $method) { $status = "400 Bad Request" }
    elsif ($method !~ /^(?:GET|HEAD)$/) { $status = "405 Method Not Allowed" }
    elsif ($path !~ m{^/(?:\?|$)}) { $status = "404 Not Found" }
    else { $body = report() }
    $client->{out} = "HTTP/1.1 $status\r\nContent-Type: application/json\r\nContent-Length: " . length($body) .
        "\r\nConnection: close\r\n\r\n" . (($method // "") eq "HEAD" ? "" : $body);
    $client->{closing} = 1;
}

sub echo {
    my ($client) = @_;
    $client->{out} .= $client->{in};
    $client->{in} = "";
}

sub drop {
    my ($number) = @_;
    close $clients{$number}{socket};
    delete $clients{$number};
}

sub read_from {
    my ($number) = @_;
    my $client = $clients{$number};
    my $count = sysread $client->{socket}, my $bytes, 65536;
    return if !defined $count && $! == $EAGAIN;
    return drop($number) unless $count;
    # What comes after the answer is read and forgotten: closing over unread bytes would reset the connection.
    return if $client->{closing};
    $client->{in} .= $bytes;
    $client->{handler}->($client);
    write_to($number) if length $client->{out};
}

sub write_to {
    my ($number) = @_;
    my $client = $clients{$number};
    my $count = syswrite $client->{socket}, $client->{out};
    return if !defined $count && $! == $EAGAIN;
    return drop($number) unless defined $count;
    substr($client->{out}, 0, $count) = "";
    shutdown $client->{socket}, 1 if $client->{closing} && !length $client->{out};
}

sub accept_from {
    my ($listener, $handler) = @_;
    while (accept(my $socket, $listener)) {
        fcntl($socket, $F_SETFL, $O_NONBLOCK);
        $clients{fileno $socket} = { socket => $socket, handler => $handler, in => "", out => "" };
        read_from(fileno $socket);
    }
}

$SIG{PIPE} = "IGNORE";
listen_on(80, \&http);
listen_on(7, \&echo);
while (1) {
    my ($reading, $writing) = ("", "");
    vec($reading, $_, 1) = 1 for keys %listeners;
    for my $number (keys %clients) {
        my $waits = length $clients{$number}{out};
        # Who does not read what it is sent is not read from either.
        vec($waits ? $writing : $reading, $number, 1) = 1;
    }
    next if select($reading, $writing, undef, undef) < 0;
    for my $number (keys %clients) {
        write_to($number) if vec($writing, $number, 1);
        read_from($number) if exists $clients{$number} && vec($reading, $number, 1);
    }
    for my $number (keys %listeners) {
        accept_from(@{ $listeners{$number} }) if vec($reading, $number, 1);
    }
}
